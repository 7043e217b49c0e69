"""Promise: a folder of PEFT's is the model that PEFT makes of it, or is refused in one
line; what PEFT refuses is refused. Adapters of PEFT's own are changed in one way each:
a key of the settings is absent, null, of a wrong type or another; a tensor is renamed,
missing, extra, of another shape."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file

from maxlm.config import MaxlmError
from maxlm.huggingface.peft.importing import AdaptedParamWriter
from maxlm.huggingface.peft.reading import read_peft_adapter
from maxlm.models.adapters import merge_adapter
from maxlm.models.params import bind, bind_specs, flatten_names, param_specs
from maxlm.models.transforms import build_transformed_model
from maxlm.run.convert import HuggingFaceModel, open_huggingface_model
from maxlm.sharding import AxisRules
from tests.parity import peft_bases

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

EQUAL, REFUSED = "equal", "refused"
ABSENT = object()
Tensors = dict[str, np.ndarray]
Change = Callable[[dict[str, Any], Tensors], None]


class ChangedCase(NamedTuple):
    adapter: str
    """One of ``peft_bases.list_adapters``."""
    change: Change | None
    outcome: str
    """What it is here."""


def set_keys(**values: Any) -> Change:
    """Sets or removes settings."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for key, value in values.items():
            config.pop(key, None)
            if value is not ABSENT:
                config[key] = value

    return change


def rename(old: str, new: str) -> Change:
    """Changes a part of all tensors' names."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        renamed = {name.replace(old, new): tensors.pop(name) for name in [*tensors]}
        tensors.update(renamed)

    return change


def remove(part: str) -> Change:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def add(name: str, *shape: int) -> Change:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        tensors[name] = np.full(shape, 0.25, np.float32)

    return change


def apply(part: str, function: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Changes the tensors with a part in their names."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = np.ascontiguousarray(function(tensors[name]))

    return change


def both(*changes: Change) -> Change:
    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for one in changes:
            one(config, tensors)

    return change


def _list_setting_cases() -> dict[str, ChangedCase]:
    cases: dict[str, ChangedCase] = {}
    for adapter, key, values in _SETTINGS:
        for outcome, setting_values in values.items():
            for value in setting_values:
                shown = "absent" if value is ABSENT else json.dumps(value)
                case = ChangedCase(adapter, set_keys(**{key: value}), outcome)
                cases[f"{adapter}-{key}={shown}"] = case
    return cases


Q = "base_model.model.model.layers.0.self_attn.q_proj"
QD = ["q_proj", "down_proj"]
_SETTINGS: tuple[tuple[str, str, dict[str, list[Any]]], ...] = (
    (
        "lora",
        "lora_alpha",
        {EQUAL: [ABSENT, 7, 7.5], REFUSED: [None, 0, -4, "7", [7], True]},
    ),
    ("lora", "r", {REFUSED: [ABSENT, None, 3, 0, -1, "2", 2.0, True]}),
    ("lora", "lora_dropout", {EQUAL: [ABSENT, 0.3], REFUSED: [None, 1.5, -0.1, "0.1"]}),
    (
        "lora",
        "bias",
        {EQUAL: [ABSENT, "all", "lora_only"], REFUSED: [None, "some", True]},
    ),
    ("lora", "use_rslora", {EQUAL: [ABSENT, True, None], REFUSED: ["yes", 1]}),
    ("rslora", "use_rslora", {EQUAL: [ABSENT, False]}),
    ("lora", "use_dora", {EQUAL: [ABSENT, None], REFUSED: [True, "x"]}),
    ("dora", "use_dora", {REFUSED: [ABSENT, False, None]}),
    ("lora", "fan_in_fan_out", {EQUAL: [ABSENT, True, None], REFUSED: ["x"]}),
    ("fused", "fan_in_fan_out", {EQUAL: [ABSENT, False]}),
    (
        "lora",
        "init_lora_weights",
        {
            EQUAL: [ABSENT, False, "gaussian", "orthogonal", "pissa"],
            REFUSED: ["olora", "loftq", "pissa_niter_4", "mica", "foo", 1],
        },
    ),
    ("pissa", "init_lora_weights", {EQUAL: [ABSENT, True]}),
    (
        "lora",
        "target_modules",
        {
            EQUAL: [
                r".*\.(q_proj|down_proj)",
                ["self_attn.q_proj", "mlp.down_proj"],
                [*QD, "w1"],
            ],
            REFUSED: [
                *(
                    ABSENT,
                    None,
                    [],
                    "",
                    ["q_proj"],
                    [*QD, "v_proj"],
                    ["foo"],
                    "q_proj",
                    "(",
                    5,
                ),
                *(
                    "all-linear",
                    [*QD, "mlp"],
                    [*QD, "act_fn"],
                    [*QD, "norm"],
                    {"q_proj": 1},
                ),
            ],
        },
    ),
    ("all_linear", "target_modules", {EQUAL: ["all-linear", "ALL-LINEAR"]}),
    (
        "lora",
        "exclude_modules",
        {
            EQUAL: [ABSENT, [], ["k_proj"], r".*k_proj", "x"],
            REFUSED: [
                ["q_proj"],
                r".*\.0\..*",
                ["model.layers.1.mlp.down_proj"],
                "(",
                3,
            ],
        },
    ),
    (
        "lora",
        "layers_to_transform",
        {
            EQUAL: [ABSENT, [], [0, 1], [0, 1, 9]],
            REFUSED: [[0], 0, [7], "0", ["0"], True],
        },
    ),
    ("one_layer", "layers_to_transform", {EQUAL: [1], REFUSED: [ABSENT, None, [0, 1]]}),
    (
        "one_layer",
        "layers_pattern",
        {EQUAL: ["layers", ["h", "layers"], ""], REFUSED: ["h"]},
    ),
    (
        "lora",
        "layers_pattern",
        {EQUAL: [ABSENT, [], ""], REFUSED: ["layers", ["layers"]]},
    ),
    (
        "lora",
        "rank_pattern",
        {
            EQUAL: [ABSENT, {"v_proj": 5}, {"q_proj": 2}],
            REFUSED: [None, {"q_proj": 3}, {"q_proj": "2"}, [], {"(": 2}],
        },
    ),
    (
        "lora",
        "alpha_pattern",
        {
            EQUAL: [ABSENT, {"q_proj": 3}, {r"layers\.0.*": 1.5}, {"q": 9}],
            REFUSED: [None, {"q_proj": "3"}, {"q_proj": None}, 4],
        },
    ),
    ("patterns", "rank_pattern", {REFUSED: [ABSENT, {}]}),
    ("patterns", "alpha_pattern", {EQUAL: [ABSENT, {"q_proj": 3, r"layers\.0.*": 2}]}),
    (
        "lora",
        "modules_to_save",
        {EQUAL: [ABSENT, [], ["x"]], REFUSED: [["lm_head"], 3]},
    ),
    ("saved", "modules_to_save", {REFUSED: [["lm_head", "embed_tokens"], ["q_proj"]]}),
    (
        "lora",
        "trainable_token_indices",
        {EQUAL: [ABSENT], REFUSED: [[1], {"embed_tokens": [1]}]},
    ),
    (
        "tokens",
        "trainable_token_indices",
        {
            EQUAL: [[5, 3], {"embed_tokens": [3, 5]}],
            REFUSED: [[3], [3, 61], ["3", "5"], {"lm_head": [3, 5]}, None, [3, 3]],
        },
    ),
    (
        "lora",
        "target_parameters",
        {EQUAL: [ABSENT, []], REFUSED: [["q_proj.weight"], "x"]},
    ),
    (
        "lora",
        "peft_type",
        {REFUSED: [ABSENT, None, "lora", "ADALORA", "LOHA", "IA3", 5]},
    ),
    ("lora", "task_type", {EQUAL: [ABSENT, None], REFUSED: ["SEQ_2_SEQ_LM", "CLM", 5]}),
    ("lora", "inference_mode", {EQUAL: [ABSENT, False]}),
    ("lora", "base_model_name_or_path", {EQUAL: [ABSENT, "someone/base"]}),
    ("lora", "auto_mapping", {EQUAL: [ABSENT]}),
    ("lora", "peft_version", {EQUAL: [ABSENT, "99.0"]}),
    ("lora", "a_key_of_tomorrow", {EQUAL: [None, False], REFUSED: [True, 3]}),
    ("lora", "loftq_config", {EQUAL: [ABSENT, {}, {"loftq_bits": 4}]}),
    ("lora", "eva_config", {REFUSED: [{"rho": 2.0}]}),
    ("lora", "corda_config", {REFUSED: [{}]}),
    ("lora", "use_qalora", {EQUAL: [ABSENT], REFUSED: [True]}),
    ("lora", "lora_bias", {EQUAL: [ABSENT, None], REFUSED: [True]}),
    ("lora", "alora_invocation_tokens", {EQUAL: [ABSENT], REFUSED: [[3]]}),
    ("lora", "layer_replication", {REFUSED: [[[0, 1], [0, 2]]]}),
    ("lora", "megatron_config", {REFUSED: [{"a": 1}]}),
    ("lora", "kasa_config", {REFUSED: [{}]}),
    ("lora", "ensure_weight_tying", {EQUAL: [ABSENT], REFUSED: [True]}),
    ("biases", "bias", {EQUAL: ["none", ABSENT]}),
    ("ia3", "feedforward_modules", {REFUSED: [ABSENT, [], ["k_proj"], ["gate_proj"]]}),
    ("ia3", "target_modules", {REFUSED: [["k_proj", "v_proj"], None, "all-linear"]}),
    ("ia3", "peft_type", {REFUSED: ["LORA"]}),
    ("ia3", "init_ia3_weights", {EQUAL: [ABSENT, False]}),
    (
        "experts",
        "target_parameters",
        {REFUSED: [None, ["mlp.experts.down_proj"], ["mlp.gate"]]},
    ),
    ("experts", "lora_dropout", {REFUSED: [0.1]}),
    ("experts", "target_modules", {REFUSED: ["all-linear", ["q_proj", "w1"]]}),
    ("prefix", "num_virtual_tokens", {REFUSED: [ABSENT, None, 4, "3"]}),
    ("prefix", "num_layers", {EQUAL: [None], REFUSED: [1, "2"]}),
    ("prefix", "token_dim", {REFUSED: [6, "x"]}),
    ("prefix", "num_attention_heads", {REFUSED: [3, "2"]}),
    ("prefix", "prefix_projection", {EQUAL: [ABSENT, True]}),
    ("prefix", "task_type", {REFUSED: [None]}),
    ("prefix", "peft_type", {REFUSED: ["PROMPT_TUNING", "P_TUNING"]}),
    ("prompt", "num_transformer_submodules", {EQUAL: [None], REFUSED: [2]}),
    ("prompt", "token_dim", {REFUSED: [12]}),
    (
        "prompt",
        "prompt_tuning_init",
        {EQUAL: [ABSENT, "RANDOM"], REFUSED: ["TEXT", "x"]},
    ),
)

_UNCHANGED = {
    f"{name}-unchanged": ChangedCase(name, None, EQUAL) for name in peft_bases.ADAPTERS
}
_TENSORS: dict[str, ChangedCase] = {
    "lora-no_prefix": ChangedCase("lora", rename("base_model.model.", ""), REFUSED),
    "lora-doubled_prefix": ChangedCase(
        "lora", rename("model.layers", "model.model.layers"), REFUSED
    ),
    "lora-adapter_name": ChangedCase(
        "lora", rename("lora_A.weight", "lora_A.default.weight"), REFUSED
    ),
    "lora-swapped_names": ChangedCase("lora", rename("lora_A", "lora_C"), REFUSED),
    "lora-other_module": ChangedCase("lora", rename("q_proj", "v_proj"), REFUSED),
    "lora-other_layer": ChangedCase("lora", rename("layers.1", "layers.2"), REFUSED),
    "lora-no_a": ChangedCase("lora", remove("q_proj.lora_A"), REFUSED),
    "lora-no_b": ChangedCase(
        "lora", remove("layers.0.self_attn.q_proj.lora_B"), REFUSED
    ),
    "lora-no_layer": ChangedCase("lora", remove("layers.1"), REFUSED),
    "lora-nothing": ChangedCase("lora", remove(""), REFUSED),
    "lora-another_module": ChangedCase(
        "lora",
        both(
            add(f"{Q[:-6]}v_proj.lora_A.weight", 2, 24),
            add(f"{Q[:-6]}v_proj.lora_B.weight", 12, 2),
        ),
        REFUSED,
    ),
    "lora-unknown_tensor": ChangedCase("lora", add(f"{Q}.lora_E", 2, 2), REFUSED),
    "lora-magnitudes": ChangedCase(
        "lora", add(f"{Q}.lora_magnitude_vector", 24), REFUSED
    ),
    "lora-bias_of_b": ChangedCase("lora", add(f"{Q}.lora_B.bias", 24), REFUSED),
    "lora-saved_embedding": ChangedCase(
        "lora", add("base_model.model.model.embed_tokens.weight", 61, 24), EQUAL
    ),
    "lora-saved_head": ChangedCase(
        "lora", add("base_model.model.lm_head.weight", 61, 24), EQUAL
    ),
    "lora-saved_norm": ChangedCase(
        "lora", add("base_model.model.model.norm.weight", 24), EQUAL
    ),
    "lora-larger_embedding": ChangedCase(
        "lora", add("base_model.model.model.embed_tokens.weight", 64, 24), REFUSED
    ),
    "lora-base_layer": ChangedCase(
        "lora", add(f"{Q}.base_layer.weight", 24, 24), EQUAL
    ),
    "lora-plain_weight": ChangedCase("lora", add(f"{Q}.weight", 24, 24), REFUSED),
    "lora-unknown_base": ChangedCase(
        "lora", add("base_model.model.model.layers.0.foo.weight", 3), REFUSED
    ),
    "lora-no_biases": ChangedCase("lora", add(f"{Q}.base_layer.bias", 24), REFUSED),
    "lora-transposed_a": ChangedCase("lora", apply("lora_A", np.transpose), REFUSED),
    "lora-cut_a": ChangedCase("lora", apply("q_proj.lora_A", lambda x: x[:1]), REFUSED),
    "lora-cut_inputs": ChangedCase(
        "lora", apply("lora_A", lambda x: x[:, :-1]), REFUSED
    ),
    "lora-third_dimension": ChangedCase(
        "lora", apply("lora_A", lambda x: x[None]), REFUSED
    ),
    "lora-half": ChangedCase(
        "lora", apply("lora", lambda x: x.astype(np.float16)), EQUAL
    ),
    "lora-bfloat16": ChangedCase(
        "lora", apply("lora", lambda x: x.astype(ml_dtypes.bfloat16)), EQUAL
    ),
    "lora-double": ChangedCase(
        "lora", apply("lora", lambda x: x.astype(np.float64)), EQUAL
    ),
    "lora-whole_numbers": ChangedCase(
        "lora", apply("lora_B", lambda x: (9 * x).astype(np.int32)), EQUAL
    ),
    "lora-zeros": ChangedCase("lora", apply("lora_A", np.zeros_like), EQUAL),
    "lora-nan": ChangedCase("lora", apply("lora_B", lambda x: x * np.nan), REFUSED),
    "lora-infinite": ChangedCase("lora", apply("lora_B", lambda x: x / 0), REFUSED),
    "rslora-other_rank": ChangedCase(
        "rslora",
        both(
            set_keys(r=1),
            apply("lora_A", lambda x: x[:1]),
            apply("lora_B", lambda x: x[:, :1]),
        ),
        EQUAL,
    ),
    "patterns-first_match": ChangedCase(
        "patterns",
        set_keys(alpha_pattern={"down_proj": 5, r".*down_proj": 1, "q_proj": 2}),
        EQUAL,
    ),
    "pissa_ranks-alpha": ChangedCase(
        "pissa_ranks", set_keys(alpha_pattern={"q_proj": 2}), EQUAL
    ),
    "pissa_ranks-of_one_layer": ChangedCase(
        "pissa_ranks",
        both(
            set_keys(rank_pattern={r"layers\.0\..*q_proj": 5}),
            apply("layers.1.self_attn.q_proj.lora_A", lambda x: x[:2]),
            apply("layers.1.self_attn.q_proj.lora_B", lambda x: x[:, :2]),
        ),
        EQUAL,
    ),
    "pissa-dora": ChangedCase("pissa", set_keys(use_dora=True), REFUSED),
    "pissa-saved_base": ChangedCase(
        "pissa", add(f"{Q}.base_layer.weight", 24, 24), REFUSED
    ),
    "fused-pissa": ChangedCase("fused", set_keys(init_lora_weights="pissa"), REFUSED),
    "dora-no_magnitude": ChangedCase("dora", remove("q_proj.lora_magnitude"), REFUSED),
    "dora-weight_of_magnitude": ChangedCase(
        "dora", rename("magnitude_vector", "magnitude_vector.weight"), REFUSED
    ),
    "dora-column": ChangedCase(
        "dora", apply("magnitude", lambda x: x[:, None]), REFUSED
    ),
    "dora-negative": ChangedCase("dora", apply("magnitude", np.negative), EQUAL),
    "embedding-names_of_maps": ChangedCase(
        "embedding", rename("lora_embedding_A", "lora_A.weight"), REFUSED
    ),
    "embedding-no_base": ChangedCase("embedding", remove("base_layer"), EQUAL),
    "embedding-other_base": ChangedCase(
        "embedding", apply("base_layer", lambda x: x + 0.5), EQUAL
    ),
    "embedding-transposed": ChangedCase(
        "embedding", apply("embedding_A", np.transpose), REFUSED
    ),
    "tied_embedding-other_base": ChangedCase(
        "tied_embedding", apply("base_layer", lambda x: x + 0.5), EQUAL
    ),
    "tied-saved_embedding": ChangedCase(
        "tied", add("base_model.model.model.embed_tokens.weight", 61, 24), EQUAL
    ),
    "tied-both_saved": ChangedCase(
        "tied",
        both(
            add("base_model.model.model.embed_tokens.weight", 61, 24),
            add("base_model.model.lm_head.weight", 61, 24),
        ),
        EQUAL,
    ),
    "tied-untied": ChangedCase(
        "tied",
        both(
            set_keys(modules_to_save=["embed_tokens"]),
            add("base_model.model.model.embed_tokens.weight", 61, 24),
        ),
        REFUSED,
    ),
    "tied-untied_head": ChangedCase(
        "tied",
        both(
            set_keys(modules_to_save=["lm_head"]),
            add("base_model.model.lm_head.weight", 61, 24),
        ),
        REFUSED,
    ),
    "saved-no_norm": ChangedCase("saved", remove("norm"), REFUSED),
    "saved-not_said": ChangedCase("saved", set_keys(modules_to_save=None), EQUAL),
    "saved-cut": ChangedCase("saved", apply("lm_head", lambda x: x[:-1]), REFUSED),
    "saved-every_norm": ChangedCase(
        "saved", set_keys(modules_to_save=["lm_head", "norm"]), REFUSED
    ),
    "saved-whole_mlp": ChangedCase(
        "lora",
        both(
            set_keys(modules_to_save=["mlp"], target_modules=["q_proj", "down_proj"]),
            remove("mlp"),
            *(
                add(
                    f"base_model.model.model.layers.{layer}.mlp.{name}_proj.weight",
                    *shape,
                )
                for layer in range(2)
                for name, shape in {
                    "gate": (34, 24),
                    "up": (34, 24),
                    "down": (24, 34),
                }.items()
            ),
        ),
        EQUAL,
    ),
    "biases-removed": ChangedCase("biases", remove("bias"), EQUAL),
    "biases-of_one": ChangedCase(
        "biases", remove("layers.0.self_attn.q_proj.base_layer.bias"), EQUAL
    ),
    "biases-plain": ChangedCase("biases", rename("base_layer.bias", "bias"), REFUSED),
    "own_biases-not_said": ChangedCase("own_biases", set_keys(bias="none"), EQUAL),
    "tokens-no_rows": ChangedCase("tokens", remove("token_adapter"), REFUSED),
    "tokens-more_rows": ChangedCase(
        "tokens", apply("token_adapter", lambda x: x[[0, 1, 1]]), REFUSED
    ),
    "tokens-embedding_too": ChangedCase(
        "tokens", set_keys(target_modules=[*QD, "embed_tokens"]), REFUSED
    ),
    "tokens-saved_too": ChangedCase(
        "tokens", set_keys(modules_to_save=["embed_tokens"]), REFUSED
    ),
    "one_layer-all_named": ChangedCase(
        "one_layer",
        set_keys(
            layers_to_transform=None,
            target_modules=[
                "model.layers.1.self_attn.q_proj",
                "layers.1.mlp.down_proj",
            ],
        ),
        EQUAL,
    ),
    "fused-cut": ChangedCase(
        "fused", apply("c_attn.lora_B", lambda x: x[:24]), REFUSED
    ),
    "fused-one_of_two": ChangedCase("fused", remove("c_attn"), REFUSED),
    "fused-c_proj": ChangedCase(
        "fused", set_keys(target_modules=["c_attn", "c_proj"]), REFUSED
    ),
    "ia3-lora_tensors": ChangedCase(
        "lora", set_keys(peft_type="IA3", r=ABSENT), REFUSED
    ),
    "ia3-transposed": ChangedCase("ia3", apply("k_proj", np.transpose), REFUSED),
    "ia3-no_layer": ChangedCase("ia3", remove("layers.1"), REFUSED),
    "ia3-lora_too": ChangedCase("ia3", add(f"{Q}.lora_A.weight", 2, 24), REFUSED),
    "ia3-one_layer": ChangedCase(
        "ia3",
        both(
            set_keys(target_modules=r".*layers\.0.*(k_proj|down_proj)"),
            remove("layers.1"),
            remove("v_proj"),
        ),
        EQUAL,
    ),
    "experts-names_swapped": ChangedCase(
        "experts", rename("experts.base_layer.", "experts."), REFUSED
    ),
    "experts-one": ChangedCase(
        "experts",
        both(
            set_keys(target_parameters=["experts.down_proj"]),
            remove("experts.base_layer"),
        ),
        EQUAL,
    ),
    "experts-ranks": ChangedCase(
        "experts",
        set_keys(alpha_pattern={"gate_up_proj": 3, "experts.down_proj": 5}),
        EQUAL,
    ),
    "experts-rslora": ChangedCase("experts", set_keys(use_rslora=True), EQUAL),
    "experts-dora": ChangedCase("experts", set_keys(use_dora=True), REFUSED),
    "all_experts-no_router": ChangedCase("all_experts", remove("mlp.gate"), REFUSED),
    "prefix-transposed": ChangedCase("prefix", apply("prompt", np.transpose), REFUSED),
    "prefix-renamed": ChangedCase(
        "prefix", rename("prompt_embeddings", "embeddings"), REFUSED
    ),
    "prefix-more": ChangedCase("prefix", add("foo", 3), REFUSED),
    "prefix-double": ChangedCase(
        "prefix", apply("prompt", lambda x: x.astype(np.float64)), EQUAL
    ),
    "prompt-cut": ChangedCase("prompt", apply("prompt", lambda x: x[:2]), REFUSED),
    "prompt-fewer": ChangedCase(
        "prompt",
        both(set_keys(num_virtual_tokens=2), apply("prompt", lambda x: x[:2])),
        EQUAL,
    ),
}
CASES: dict[str, ChangedCase] = _UNCHANGED | _list_setting_cases() | _TENSORS


class Originals(NamedTuple):
    bases: dict[str, Any]
    opened: dict[str, HuggingFaceModel]
    parameters: dict[str, dict[str, np.ndarray]]
    """Of each base, by canonical name."""
    folders: dict[str, Path]
    """Of the adapters."""


class ArrayWriter:
    """Keeps parameters in memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.arrays[name] = np.full(shape, np.nan, dtype)

    def write(self, name: str, lead_index: tuple[int, ...], values: np.ndarray) -> None:
        self.arrays[name][lead_index] = values


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Originals:
    home = tmp_path_factory.mktemp("peft")
    bases = peft_bases.build_bases()
    opened: dict[str, HuggingFaceModel] = {}
    for name, base in bases.items():
        base.save_pretrained(home / name)
        opened[name] = open_huggingface_model(home / name, home / "runs" / name)
    folders: dict[str, Path] = {}
    for name, config in peft_bases.list_adapters().items():
        folders[name] = home / "adapters" / name
        peft_bases.write_adapter(
            bases[peft_bases.ADAPTERS[name]], config, folders[name]
        )
    return Originals(bases, opened, {}, folders)


def run_peft(base: Any, folder: Path) -> np.ndarray | None:
    """PEFT's logits [B, S, V]; None: it refuses the adapter."""
    tokens = torch.tensor(peft_bases.TOKENS)
    try:
        with torch.no_grad():
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            logits = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens)
            ).logits
    except Exception:  # It has many ways to refuse.
        return None
    return logits[:, -tokens.shape[1] :].numpy()


def run_ours(opened: HuggingFaceModel, folder: Path, mesh: Any) -> np.ndarray:
    """Our logits [B, S, V] of the base and the adapter, merged where it can be."""
    config = opened.config.model
    specs = param_specs(config.build(rules=AxisRules(), dtype=np.float32))
    read = read_peft_adapter(folder, config, specs, opened.family.list_entries(config))
    memory = ArrayWriter()
    writer = AdaptedParamWriter(memory, read, specs)
    opened.import_tensors(writer)
    writer.finish()
    model = build_transformed_model(
        config, [read.adapter], rules=AxisRules(), dtype=np.float32
    )
    with jax.set_mesh(mesh):
        adapted = param_specs(model)
        names = flatten_names(adapted)
        params = jax.tree.unflatten(
            jax.tree.structure(adapted),
            [jax.numpy.asarray(memory.arrays[n]) for n in names],
        )
        num_virtual = model.num_virtual_tokens
        if not num_virtual:
            merged_specs, params = merge_adapter(adapted, params)
            is_base = {*flatten_names(params)} == {*flatten_names(specs)}
            model = _build_base(config) if is_base else bind_specs(model, merged_specs)
        tokens = np.pad(peft_bases.TOKENS, ((0, 0), (num_virtual, 0))).astype(np.int32)
        return np.asarray(_forward(model, params, tokens))[:, num_virtual:]


_MODELS: dict[int, Any] = {}


def _build_base(config: Any) -> Any:
    """One model a config, so that its program is compiled once."""
    if id(config) not in _MODELS:
        _MODELS[id(config)] = config.build(rules=AxisRules(), dtype=np.float32)
    return _MODELS[id(config)]


@partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, tokens: np.ndarray) -> jax.Array:
    positions = np.broadcast_to(
        np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
    )
    bound = bind(model, params)
    return bound.logits(bound(tokens, positions)[0])


@pytest.mark.parametrize("name", CASES)
def test_a_changed_adapter_is_pefts_model_or_refused(
    originals, tmp_path, one_device_mesh, name
):
    case = CASES[name]
    base = peft_bases.ADAPTERS[case.adapter]
    folder = originals.folders[case.adapter]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if case.change is not None:
        case.change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if case.outcome == REFUSED:
        with pytest.raises(MaxlmError) as caught:
            run_ours(originals.opened[base], tmp_path, one_device_mesh)
        assert "\n" not in str(caught.value.message)
        return
    ours = run_ours(originals.opened[base], tmp_path, one_device_mesh)
    theirs = run_peft(originals.bases[base], tmp_path)
    assert theirs is not None, "PEFT refuses it"
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_cases_are_enough():
    assert len(CASES) - len(_UNCHANGED) >= 149
