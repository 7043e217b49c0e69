"""Promises of PEFT's folders that need no PEFT: what is refused and the line that says
so, what is computed by the formulas of the papers, and that a folder is written as it
was read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.huggingface.families import FAMILIES
from maxlm.huggingface.peft.importing import AdaptedParamWriter, list_trained_names
from maxlm.huggingface.peft.reading import PeftAdapter, read_peft_adapter
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import flatten_names, is_leaf, param_specs
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.serving.program import read_lora_adapter
from maxlm.sharding import AxisRules
from tests.errors import message
from tests.train import tiny

D, F, V, L = 6, 8, 11, 2
ATTENTION = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 2}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "num_layers": L,
    "d_model": D,
    "max_seq_len": 16,
}
LLAMA = DecoderConfig.model_validate(
    SIZES | {"attention": ATTENTION, "mlp": {"d_ff": F}}
)
TIED = LLAMA.model_copy(update={"tie_embeddings": True})
MIXTRAL = DecoderConfig.model_validate(
    SIZES
    | {"attention": ATTENTION, "mlp": None}
    | {"moe": {"num_experts": 3, "experts_per_token": 2, "d_ff": F}}
)
PREFIX = "base_model.model."
Q = "model.layers.{}.self_attn.q_proj"
SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "target_modules": ["q_proj"],
}
Tensors = dict[str, np.ndarray]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, *shape])
    return random.standard_normal(shape).astype(np.float32)


def make_pair(module: str, inputs: int, outputs: int, rank: int = 2) -> Tensors:
    return {
        f"{PREFIX}{module}.lora_A.weight": draw(rank, inputs, seed=len(module)),
        f"{PREFIX}{module}.lora_B.weight": draw(outputs, rank, seed=len(module)),
    }


def make_queries(rank: int = 2, layers: int = L) -> Tensors:
    tensors: Tensors = {}
    for layer in range(layers):
        pair = make_pair(Q.format(layer), D, 6, rank)
        tensors |= {name: tensor + np.float32(layer) for name, tensor in pair.items()}
    return tensors


def write_folder(folder: Path, settings: Mapping[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    # Of arrays that are views the library would write the bytes of what they view.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def build_specs(config: Any) -> Any:
    return param_specs(config.build(rules=AxisRules(), dtype=np.float32))


def list_entries(config: Any) -> Any:
    return FAMILIES.get("mixtral" if config.moe else "llama").list_entries(config)


def read(folder: Path, config: Any = LLAMA) -> PeftAdapter:
    return read_peft_adapter(folder, config, build_specs(config), list_entries(config))


class Memory(dict[str, np.ndarray]):
    """Takes parameters as a checkpoint does."""

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self[name] = np.full(shape, np.nan, dtype)

    def write(self, name: str, lead_index: tuple[int, ...], values: np.ndarray) -> None:
        self[name][lead_index] = values


def draw_base(config: Any) -> dict[str, np.ndarray]:
    specs = flatten_names(build_specs(config))
    return {name: draw(*spec.shape, seed=len(name)) for name, spec in specs.items()}


def adapt(peft: PeftAdapter, config: Any = LLAMA) -> Memory:
    """The parameters of a random base beside an adapter, by canonical name."""
    memory = Memory()
    writer = AdaptedParamWriter(memory, peft, build_specs(config))
    for name, values in draw_base(config).items():
        lead = flatten_names(build_specs(config))[name].num_layer_axes
        writer.declare(name, values.shape, lead)
        for index in np.ndindex(*values.shape[:lead]):
            writer.write(name, index, values[index])
    writer.finish()
    return memory


def merge(peft: PeftAdapter, config: Any = LLAMA) -> dict[str, np.ndarray]:
    """The same, merged."""
    memory = adapt(peft, config)
    adapted = peft.adapter.adapt(build_specs(config))
    names = flatten_names(adapted)
    values = [memory[name] for name in names]
    params = jax.tree.unflatten(jax.tree.structure(adapted), values)
    merged = {}
    for name, leaf in flatten_names(params, is_leaf).items():
        merged[name] = np.asarray(leaf.merge() if is_leaf(leaf) else leaf)
    return merged


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha_0": ({"lora_alpha": 0}, "lora_alpha=0 is not above 0; correct it"),
    "alpha_null": ({"lora_alpha": None}, "lora_alpha=null is no number; correct it"),
    "alpha_text": ({"lora_alpha": "7"}, 'lora_alpha="7" is no number; correct it'),
    "rank_text": ({"r": "2"}, 'r="2" is no whole number above 0'),
    "other_rank": (
        {"r": 3},
        "lora_A.weight is [2, 6], and [3, 6] by the settings and this model",
    ),
    "kind": (
        {"peft_type": "LOHA"},
        "peft_type='LOHA' is not implemented; merge it with PEFT",
    ),
    "task": (
        {"task_type": "SEQ_2_SEQ_LM"},
        'is not implemented (known are "CAUSAL_LM", null)',
    ),
    "ia3": (
        {"peft_type": "IA3", "r": None},
        "the file lacks: model.layers.0.self_attn.q_proj.ia3",
    ),
    "init": (
        {"init_lora_weights": "olora"},
        'init_lora_weights="olora" is not implemented',
    ),
    "flag": ({"use_dora": 1}, "use_dora=1 is neither true nor false"),
    "dropout": ({"lora_dropout": 2}, "lora_dropout=2 is no probability"),
    "bias": (
        {"bias": "some"},
        'bias="some" is not implemented (known are "none", "all"',
    ),
    "variant": (
        {"use_qalora": True},
        "use_qalora is not implemented; merge it with PEFT",
    ),
    "unknown": (
        {"a_later_key": 3},
        "unknown to maxlm: a_later_key; remove it if it is off",
    ),
    "expression": (
        {"target_modules": "("},
        'target_modules="(" is no regular expression',
    ),
    "no_target": (
        {"target_modules": ["foo"]},
        "mean no map of this model; name the base",
    ),
    "more": (
        {"target_modules": ["q_proj", "up_proj"]},
        "lacks: model.layers.0.mlp.up_proj.lora_A",
    ),
    "fewer": (
        {"layers_to_transform": [0]},
        "have no place for: base_model.model.model.layers.1.self",
    ),
    "excluded": (
        {"exclude_modules": r".*\.0\..*"},
        "no place for: base_model.model.model.layers.0.self",
    ),
    "norm": (
        {"target_modules": ["q_proj", "norm"]},
        "model.norm, which is no linear map",
    ),
    "saved": ({"modules_to_save": ["lm_head"]}, "that the file lacks: lm_head.weight"),
    "token": (
        {"trainable_token_indices": [V]},
        "=[11], and model.embed_tokens has 11 rows",
    ),
    "token_of_head": (
        {"trainable_token_indices": {"lm_head": [1]}},
        "the file lacks: lm_head.token_adapter",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_one_line(tmp_path, name):
    change, line = REFUSALS[name]
    folder = write_folder(tmp_path, SETTINGS | change, make_queries())
    with pytest.raises(MaxlmError) as caught:
        read(folder)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_have_no_place_are_refused(tmp_path):
    tensors = make_queries()
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    folder = write_folder(tmp_path, SETTINGS, bare)
    assert "tensors without PEFT's prefix" in message(read, folder)
    nan = {name: tensor * np.float32("nan") for name, tensor in tensors.items()}
    folder = write_folder(tmp_path, SETTINGS, nan)
    assert "infinite or no numbers" in message(read, folder)
    tied = SETTINGS | {"modules_to_save": ["embed_tokens"]}
    table = {f"{PREFIX}model.embed_tokens.weight": draw(V, D)}
    folder = write_folder(tmp_path, tied, tensors | table)
    assert "which this model ties to lm_head.weight" in message(read, folder, TIED)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refusal = message(read, tmp_path)
    assert "adapter_model.bin is a pickle, which can run any code" in refusal


def make_queries_of_two_ranks() -> Tensors:
    """Of rank 4 in layer 0, of rank 2 in layer 1."""
    tensors = make_queries(rank=4)
    for name, tensor in tensors.items():
        if ".1." in name:
            tensors[name] = tensor[:2] if "lora_A" in name else tensor[:, :2]
    return tensors


def test_lora_is_its_formula_with_ranks_alphas_and_layers_of_its_own(tmp_path):
    tensors = make_queries_of_two_ranks()
    settings = SETTINGS | {"use_rslora": True, "rank_pattern": {r"layers\.0\..*": 4}}
    settings |= {"alpha_pattern": {r"layers\.1\..*": 5}}  # and PEFT's default of 8
    peft = read(write_folder(tmp_path, settings, tensors))
    merged = merge(peft)
    base = draw_base(LLAMA)
    # Rank-stabilized: alpha over the square root of the rank.
    for layer, scale in ((0, 8 / 4**0.5), (1, 5 / 2**0.5)):
        a = tensors[f"{PREFIX}{Q.format(layer)}.lora_A.weight"]
        b = tensors[f"{PREFIX}{Q.format(layer)}.lora_B.weight"]
        kernel = base["layers.attention.query.kernel"][layer].reshape(D, 6)
        expected = kernel + scale * (b @ a).T
        adapted_kernel = merged["layers.attention.query.kernel"][layer].reshape(D, 6)
        np.testing.assert_allclose(adapted_kernel, expected, rtol=1e-5, atol=1e-5)
    one = SETTINGS | {"layers_to_transform": [1], "lora_dropout": 0.25}
    last = {name: tensor for name, tensor in make_queries().items() if ".1." in name}
    peft = read(write_folder(tmp_path, one, last))
    assert peft.adapter.dropout == 0.25
    kernel = "layers.attention.query.kernel"
    difference = merge(peft)[kernel] - base[kernel]
    assert np.abs(difference[1]).min() > 0
    np.testing.assert_array_equal(difference[0], 0)


def test_pissa_takes_each_matrix_its_own_rank(tmp_path):
    tensors = make_queries_of_two_ranks()
    settings = SETTINGS | {
        "init_lora_weights": "pissa",
        "rank_pattern": {r".*\.0\..*": 4},
    }
    memory = adapt(read(write_folder(tmp_path, settings, tensors)))
    for layer, rank in ((0, 4), (1, 2)):
        kernel = draw_base(LLAMA)["layers.attention.query.kernel"][layer].reshape(D, 6)
        values = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)
        rest = memory["layers.attention.query.kernel.base"][layer].reshape(D, 6)
        rest_values = np.linalg.svd(rest.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(
            rest_values[: 6 - rank], values[rank:], rtol=1e-4, atol=1e-5
        )


def test_the_files_own_weights_of_the_base_are_read(tmp_path):
    """PEFT reads every tensor that its model has the name of."""
    base_tensors = {
        "model.norm.weight": draw(D),
        "model.embed_tokens.weight": draw(V, D),
        "model.layers.1.self_attn.q_proj.base_layer.weight": draw(6, D),
    }
    tensors = make_queries() | {
        f"{PREFIX}{name}": tensor for name, tensor in base_tensors.items()
    }
    settings = SETTINGS | {"modules_to_save": ["model.norm"]}
    peft = read(write_folder(tmp_path, settings, tensors))
    memory = adapt(peft)
    base = draw_base(LLAMA)
    np.testing.assert_array_equal(
        memory["final_norm.scale"], base_tensors["model.norm.weight"]
    )
    np.testing.assert_array_equal(
        memory["embedding.table"], base_tensors["model.embed_tokens.weight"]
    )
    kernel = memory["layers.attention.query.kernel.base"]
    changed = base_tensors["model.layers.1.self_attn.q_proj.base_layer.weight"].T
    np.testing.assert_array_equal(kernel[1].reshape(D, 6), changed)
    np.testing.assert_array_equal(kernel[0], base["layers.attention.query.kernel"][0])
    names = list_trained_names(peft, build_specs(LLAMA))
    assert {"final_norm.scale", "layers.attention.query.kernel.base"} < {*names}


def test_rows_of_tokens_are_replaced(tmp_path):
    rows = {
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": draw(2, D)
    }
    settings = SETTINGS | {"trainable_token_indices": [7, 3]}
    peft = read(write_folder(tmp_path, settings, make_queries() | rows))
    table = draw_base(LLAMA)["embedding.table"]
    table[[7, 3]] = draw(2, D)
    np.testing.assert_array_equal(merge(peft)["embedding.table"], table)


def test_experts_share_the_map_of_their_inputs_there(tmp_path):
    """``ParamWrapper`` of PEFT: delta[e] = scale · B[:, :, e] · A[e]; gates stand over
    the maps beside them."""
    experts, rank = 3, 2
    module = "model.layers.{}.mlp.experts"
    tensors: Tensors = {}
    for layer in range(L):
        gate_up = f"{PREFIX}{module.format(layer)}.base_layer"
        down = f"{PREFIX}{module.format(layer)}"
        tensors |= {f"{gate_up}.lora_A.weight": draw(rank * experts, D, seed=layer)}
        tensors |= {f"{gate_up}.lora_B.weight": draw(2 * F, rank * experts, seed=layer)}
        tensors |= {f"{down}.lora_A.weight": draw(rank * experts, F, seed=layer)}
        tensors |= {f"{down}.lora_B.weight": draw(D, rank * experts, seed=layer)}
    names = ["experts.gate_up_proj", "experts.down_proj"]
    settings = SETTINGS | {"target_modules": [], "target_parameters": names}
    folder = write_folder(tmp_path / "peft", settings, tensors)
    merged = merge(read(folder, MIXTRAL), MIXTRAL)
    base = draw_base(MIXTRAL)
    for layer, expert in np.ndindex(L, experts):
        prefix = f"{PREFIX}{module.format(layer)}"
        a = tensors[f"{prefix}.base_layer.lora_A.weight"].reshape(experts, rank, D)
        b = tensors[f"{prefix}.base_layer.lora_B.weight"].reshape(2 * F, rank, experts)
        scale = 4  # PEFT's default alpha of 8, over the rank.
        delta = scale * b[:, :, expert] @ a[expert]
        for name, rows in (("gate", slice(F)), ("up", slice(F, 2 * F))):
            change = merged[f"layers.moe.{name}"] - base[f"layers.moe.{name}"]
            np.testing.assert_allclose(
                change[layer, expert].T, delta[rows], rtol=1e-4, atol=1e-4
            )
    again = write_again(tmp_path, folder, MIXTRAL)
    assert {*again} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_allclose(again[name], tensor, rtol=1e-6)
    old = SETTINGS | {"target_modules": ["w1", "w3"]}
    folder = write_folder(tmp_path / "old", old, tensors)
    refusal = message(read, folder, MIXTRAL)
    assert "means experts by 'w1'; load and save it with PEFT" in refusal


def write_run(
    folder: Path, peft: PeftAdapter, config: Any, trainable: Sequence[str] = ()
) -> RunConfig:
    """A run of a random base and an adapter; ``trainable``: by default the adapter."""
    settings = tiny.settings(folder, "") | {"adapter": peft.adapter.model_dump()}
    train = {"trainable": list(trainable)} if trainable else {}
    settings |= {"model": config.model_dump(), "train": train}
    settings["data"]["seq_len"] = 8
    run = RunConfig.model_validate(settings)
    writer = RunCheckpointWriter(folder / "checkpoints")
    for name, array in adapt(peft, config).items():
        writer.declare(name, array.shape)
        writer.write(name, (), array)
    writer.commit({"config": run.model_dump(mode="json")})
    (folder / "config.yaml").write_text(to_yaml(run))
    return run


def write_again(folder: Path, source: Path, config: Any = LLAMA) -> Tensors:
    """What ``convert --adapter`` writes of a run with an adapter of PEFT's."""
    peft = read(source, config)
    trained = list_trained_names(peft, build_specs(config))
    write_run(folder / "run", peft, config, trained)
    convert(folder / "run", folder / "again", adapter=True)
    return load_file(folder / "again" / "adapter_model.safetensors")


def read_written_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "again" / "adapter_config.json").read_text())


def test_what_was_trained_beside_the_adapter_is_written(tmp_path):
    trained_tensors = {
        "model.norm.weight": draw(D),
        "lm_head.weight": draw(V, D),
        "model.layers.0.self_attn.q_proj.base_layer.weight": draw(6, D),
        "model.layers.1.self_attn.q_proj.base_layer.weight": draw(6, D, seed=1),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": draw(1, D),
    }
    tensors = make_queries() | {
        f"{PREFIX}{name}": tensor for name, tensor in trained_tensors.items()
    }
    settings = SETTINGS | {"modules_to_save": ["model.norm", "lm_head"]}
    settings |= {"trainable_token_indices": [3], "lora_dropout": 0.5, "lora_alpha": 5}
    folder = write_folder(tmp_path / "peft", settings, tensors)
    again = write_again(tmp_path, folder)
    assert {*again} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    written = read_written_settings(tmp_path)
    expected = settings | {"modules_to_save": ["lm_head", "model.norm"]}
    assert {key: written[key] for key in settings} == expected
    path = tmp_path / "run"
    model = LLAMA.build(rules=AxisRules(), dtype=np.float32)
    refusal = message(read_lora_adapter, path, base_folder=path, model=model)
    assert (
        "it was trained with final_norm.scale of the base, which all adapters here "
        "share" in refusal
    )


def test_a_tied_table_is_written_for_both(tmp_path):
    table = {f"{PREFIX}model.embed_tokens.weight": draw(V, D)}
    tensors = make_queries() | table
    folder = write_folder(tmp_path / "peft", SETTINGS, tensors)
    again = write_again(tmp_path, folder, TIED)
    assert {*again} == {*tensors}
    assert "modules_to_save" not in read_written_settings(tmp_path)


def test_layers_are_written_as_layers(tmp_path):
    last = {name: tensor for name, tensor in make_queries().items() if ".1." in name}
    settings = SETTINGS | {"layers_to_transform": [1]}
    again = write_again(tmp_path, write_folder(tmp_path / "peft", settings, last))
    assert {*again} == {*last}
    written = read_written_settings(tmp_path)
    assert written["target_modules"] == ["q_proj"]
    assert written["layers_to_transform"] == [1]


def test_what_no_file_can_hold_is_refused(tmp_path):
    peft = read(write_folder(tmp_path / "peft", SETTINGS, make_queries()), MIXTRAL)
    write_run(tmp_path / "run", peft, MIXTRAL, ["*.lora_*", "layers.moe.*"])
    refusal = message(convert, tmp_path / "run", tmp_path / "out", adapter=True)
    assert "trained, and no file of PEFT's holds them: layers.moe.down" in refusal
    assert not (tmp_path / "out").exists()
