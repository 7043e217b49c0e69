"""Adapters against PEFT: logits, counts, merging, and files both ways."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.models.params import (
    bind,
    flatten_names,
    join_path,
)
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.load import load_run
from maxlm.run.setup import set_up_run
from maxlm.run.warm_start import init_or_warm_start_state
from tests.parity import peft_bases

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = peft_bases.TOKENS
CONV: dict[str, Any] = {"fan_in_fan_out": True}
CASES: dict[str, Any] = {
    "lora": peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "o_proj"]
    ),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
    "pissa": peft.LoraConfig(
        r=3, init_lora_weights="pissa", target_modules=["k_proj", "up_proj"]
    ),
    "pissa_dora": peft.LoraConfig(
        r=2, use_dora=True, init_lora_weights="pissa", target_modules=["o_proj"]
    ),
    "patterns": peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 5},
        alpha_pattern={"v_proj": 3},
    ),
    "embedding": peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "lm_head", "v_proj"]
    ),
    "dora_embedding": peft.LoraConfig(
        r=3, use_dora=True, target_modules=["embed_tokens"]
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


# What is trained beside A and B, or of some layers; their bases are tied, biased, have
# experts.
SHARED = (
    *(
        "pissa_ranks",
        "one_layer",
        "saved",
        "tokens",
        "head_tokens",
        "tied_embedding",
        "tied_tokens",
        "biases",
    ),
    *("own_biases", "experts", "all_experts"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bases, as published."""
    folder = tmp_path_factory.mktemp("bases")
    for name, model in peft_bases.build_bases().items():
        model.save_pretrained(folder / name)
    return folder


def adapt(folder: Path, config: Any) -> Any:
    """A published model with a random adapter of PEFT's."""
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )
    model = peft.get_peft_model(base.eval(), config).eval()
    peft_bases.randomize(model)
    return model


def run_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def run_ours(folder: Path, *, merge: bool) -> np.ndarray:
    loaded = load_run(folder, merge=merge)
    with jax.set_mesh(loaded.mesh):
        return compute_logits(loaded.model, loaded.params)


def compute_logits(model: Any, params: Any) -> np.ndarray:
    positions = np.broadcast_to(
        np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape
    )

    @jax.jit
    def run(params: Any) -> Any:
        bound = bind(model, params)
        return bound.logits(bound(TOKENS.astype(np.int32), positions)[0])

    return np.asarray(run(params))


@pytest.fixture(autouse=True)
def _without_tokenizer(monkeypatch):
    monkeypatch.setattr("maxlm.run.load.load_tokenizer", lambda folder: None)


def check(
    folders: Path, base: str, config: Any, tmp_path: Path, *, merges: bool = True
) -> None:
    """PEFT's files here, ours there, and the merged model as transformers reads it."""
    theirs = adapt(folders / base, config)
    want = run_torch(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "run", base=folders / base)
    plain = run_torch(transformers.AutoModelForCausalLM.from_pretrained(folders / base))
    assert np.abs(want - plain).max() > 0.01
    for merge in (False, True):
        got = run_ours(tmp_path / "run", merge=merge)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    ours = load_run(tmp_path / "run", merge=False)
    names = [n for n in flatten_names(ours.params) if ".lora_" in n or ".ia3" in n]
    count = sum(flatten_names(ours.params)[name].size for name in names)
    trainable, _ = theirs.get_nb_trainable_parameters()
    if (
        base == "llama"
        and config in CASES.values()
        and not getattr(config, "rank_pattern", None)
    ):
        assert count == trainable

    convert(tmp_path / "run", tmp_path / "back", adapter=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / base)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "back").eval()
    np.testing.assert_allclose(run_torch(again), want, rtol=1e-5, atol=1e-5)
    if not merges:
        with pytest.raises(MaxlmError, match=r"cannot be merged; --adapter writes"):
            convert(tmp_path / "run", tmp_path / "merged")
        return
    convert(tmp_path / "run", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(run_torch(merged), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_files_of_llama_compute_the_same_both_ways(folders, tmp_path, name):
    check(folders, "llama", CASES[name], tmp_path)


@pytest.mark.parametrize("name", SHARED)
def test_what_is_trained_beside_the_adapter_goes_both_ways(folders, tmp_path, name):
    config = peft_bases.list_adapters()[name]
    # A table that the head reads too has no one matrix with what LoRA adds to the table
    # alone.
    merges = name != "tied_embedding"
    check(folders, peft_bases.ADAPTERS[name], config, tmp_path, merges=merges)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("qwen", CASES["dora"]),
        ("qwen", CASES["ia3"]),
        (
            "gpt2",
            peft.LoraConfig(
                r=3, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"]
            ),
        ),
        (
            "gpt2",
            peft.LoraConfig(
                r=2, fan_in_fan_out=True, use_dora=True, target_modules=["c_attn"]
            ),
        ),
        (
            "gpt2",
            peft.IA3Config(
                target_modules=["c_attn", "mlp.c_proj"],
                feedforward_modules=["mlp.c_proj"],
                **CONV,
            ),
        ),
    ],
    ids=["biases", "ia3_biases", "fused", "fused_dora", "fused_ia3"],
)
def test_biases_and_fused_maps(folders, tmp_path, base, config):
    check(folders, base, config, tmp_path)


def test_an_adapter_of_another_base_is_refused(folders, tmp_path):
    adapt(folders / "llama", CASES["lora"]).save_pretrained(tmp_path / "peft")
    with pytest.raises(MaxlmError, match="mean no map of this model; name the base"):
        convert(tmp_path / "peft", tmp_path / "run", base=folders / "gpt2")
    assert not (tmp_path / "run").exists()
    with pytest.raises(MaxlmError, match="an adapter without its base"):
        convert(tmp_path / "peft", tmp_path / "run")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]})
    )
    with pytest.raises(MaxlmError, match=r"that the file lacks: lm_head\.weight"):
        convert(tmp_path / "peft", tmp_path / "run", base=folders / "llama")


def test_pissa_trained_here_is_exact_there(folders, tmp_path):
    """PEFT repeats the decomposition of PiSSA when it reads an adapter, and rounding
    turns singular vectors whose values are near. So the file holds the difference from
    the start instead."""
    convert(folders / "llama", tmp_path / "start")
    setup, state = begin_run(tmp_path, {"kind": "lora", "rank": 3, "init": "pissa"})
    write_run(tmp_path / "run", setup.config, randomize(state.params))
    convert(tmp_path / "run", tmp_path / "peft", adapter=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    want = run_ours(tmp_path / "run", merge=False)
    assert np.abs(run_torch(theirs) - want).max() <= 3e-6 * np.abs(want).max()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (6, True)


def begin_run(folder: Path, adapter: dict[str, Any]) -> tuple[Any, Any]:
    """A run that begins with an adapter on the run ``start``, and its first state."""
    start = load_config(RunConfig, folder / "start" / "config.yaml").value
    settings = start.model_dump(mode="json") | {
        "adapter": adapter,
        "folder": str(folder),
    }
    settings["train"]["start_from"] = str(folder / "start")
    setup = set_up_run(RunConfig.model_validate(settings), jax.devices()[:1])
    return setup, init_or_warm_start_state(setup)


def randomize(params: Any) -> Any:
    """What an adapter adds, moved by noise."""
    draw = np.random.default_rng(0).standard_normal

    def move(path: Any, x: Any) -> Any:
        is_added = ".lora_" in join_path(path)
        return np.asarray(x) + np.float32(0.02 * is_added) * draw(x.shape).astype(
            np.float32
        )

    return jax.tree_util.tree_map_with_path(move, params)


def write_run(folder: Path, config: RunConfig, params: Any) -> None:
    writer = RunCheckpointWriter(folder / "checkpoints")
    for name, array in flatten_names(params).items():
        writer.declare(name, array.shape)
        writer.write(name, (), array)
    writer.commit({"config": config.model_dump(mode="json")})
    (folder / "config.yaml").write_text(to_yaml(config))
