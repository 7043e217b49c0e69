"""Runs of our own as published folders and back: parameters, number formats and tokenizers come
through bit for bit, and what no family computes is refused."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError, load, to_yaml
from maxlm.data.tokenizer import load_tokenizer
from maxlm.huggingface.checkpoint import CheckpointWriter
from maxlm.huggingface.files import read, stored_tensors
from maxlm.models.params import named, param_specs
from maxlm.programs.convert import convert
from maxlm.programs.load import load_run
from maxlm.programs.pretrain import pretrain
from maxlm.run import RunConfig
from maxlm.sharding import AxisRules
from tests.models.published import folder_of, golden
from tests.programs import tiny

LLAMA = tiny.settings(Path(), "")["model"]
GPT2 = LLAMA | {
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "bias": True},
    "mlp": {"d_ff": 64, "activation": "gelu_tanh", "gated": False, "bias": True},
    "norm": {"kind": "layernorm", "bias": True},
    "positions": {"kind": "learned"},
    "tie_embeddings": True,
}
# Whatever it is for, none of the published ones has it.
OWN = LLAMA | {"placement": "parallel", "embedding_scale": 3.0}


def trained(folder: Path) -> Path:
    """A run of a few steps, with a tokenizer of its own."""
    text = tiny.write_text(folder / "text")
    path = tiny.write_config(folder, text, train={"steps": 2})
    pretrain(load(RunConfig, path).value, say=lambda _: None)
    return folder / "tiny"


def alike(run: Path, model: dict[str, Any]) -> Path:
    """A run beside it of another model, with random parameters."""
    folder = Path(tempfile.mkdtemp(dir=run.parent))
    config = load(RunConfig, run / "config.yaml").value
    config = RunConfig.model_validate(config.model_dump() | {"name": "other", "model": model})
    specs = named(param_specs(config.model.build(rules=AxisRules(), dtype=np.float32)))
    random = np.random.default_rng(0)
    with CheckpointWriter(folder / "checkpoints") as writer:
        for name, spec in specs.items():
            writer.declare(name, spec.shape)
            writer.write(name, (), random.normal(size=spec.shape).astype(np.float32))
        writer.commit({"config": config.model_dump(mode="json")})
    shutil.copytree(run / "tokenizer", folder / "tokenizer")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"))


def parameters(folder: Path) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named(load_run(folder).params))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_there_and_back(llama, name, tmp_path):
    run = llama if name == "llama" else alike(llama, GPT2)
    done = convert(run, tmp_path / "published")
    assert (done.family, done.dtype) == (name, "F32")
    values = json.loads((tmp_path / "published/config.json").read_text())
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (values["bos_token_id"], values["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    convert(tmp_path / "published", tmp_path / "again")

    want, got = parameters(run), parameters(tmp_path / "again")
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
    first, again = (
        load(RunConfig, folder / "config.yaml").value.model for folder in (run, tmp_path / "again")
    )
    assert first.model_copy(update={"remat": again.remat}) == again
    there = load_tokenizer(tmp_path / "again/tokenizer")
    text = "the sun rises over a  quiet sea\n\tändert 42 <|bos|>"
    assert there.encode(text) == tokenizer.encode(text)
    assert there.decode(there.encode(text)) == text


def test_what_goes_on_from_a_family_goes_out_under_it(llama, tmp_path):
    done = convert(llama, tmp_path / "published", family="mistral")
    assert done.family == "mistral"
    path = tmp_path / "published/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5, 1]}))
    convert(tmp_path / "published", tmp_path / "run")
    tuned = tiny.write_config(
        tmp_path,
        str(llama.parent / "text"),
        train={"steps": 1, "start_from": str(tmp_path / "run")},
        schedule={"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-9},
    )
    pretrain(load(RunConfig, tuned).value, say=lambda _: None)
    want, got = parameters(llama), parameters(tmp_path / "tiny")
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-7, err_msg=name)
    pretrain(load(RunConfig, tuned, ["train.steps=2"]).value, say=lambda _: None)  # and resumed

    done = convert(tmp_path / "tiny", tmp_path / "out")
    assert (done.family, done.dtype) == ("mistral", "F32")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == "mistral"
    assert values["eos_token_id"] == [5, 1]


def test_a_model_of_no_family_is_refused(llama, tmp_path):
    own = alike(llama, OWN)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MaxlmError, match="no published family computes what this model does"):
        convert(own, tmp_path / "published")
    with pytest.raises(MaxlmError, match=r"LlamaForCausalLM has no word for model\.\w+=") as caught:
        convert(own, tmp_path / "published", family="llama")
    assert "placement='parallel'" in str(caught.value) or "embedding_scale=3.0" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_number_formats_come_back(tmp_path):
    tensors = dict(golden("gpt2").tensors)
    odd = {
        "transformer.ln_f.weight": np.linspace(-1, 1, 28, dtype=np.float32),
        "transformer.ln_f.bias": np.linspace(-1, 1, 28, dtype=np.float16),
    }
    source = folder_of("gpt2", tmp_path / "their", tensors | odd)
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    check_same_tensors(tmp_path / "again", tensors | odd)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"

    done = convert(tmp_path / "run", tmp_path / "half", dtype="float16")
    assert done.dtype == "F16"
    kinds = {stored.dtype for stored in stored_tensors(tmp_path / "half").values()}
    assert kinds == {"F16"}


def test_many_files_are_one_model(tmp_path):
    source = folder_of("deepseek_v2", tmp_path / "their")
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again", shard_bytes=30_000)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 3
    check_same_tensors(tmp_path / "again", golden("deepseek_v2").tensors)
    convert(tmp_path / "again", tmp_path / "run2")
    convert(tmp_path / "run2", tmp_path / "whole")
    check_same_tensors(tmp_path / "whole", golden("deepseek_v2").tensors)


def check_same_tensors(folder: Path, want: dict[str, np.ndarray]) -> None:
    got = {name: read(stored) for name, stored in stored_tensors(folder).items()}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].tobytes() == value.tobytes(), name


def test_a_tokenizers_files_come_back_byte_for_byte(llama, tmp_path):
    source = tmp_path / "their"
    convert(llama, source)
    files = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
    path = source / "tokenizer.json"  # as another program would have laid it out
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3) + "\n\n")
    roles = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "model_max_length": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(roles, indent=1))
    (source / "special_tokens_map.json").write_text("{ }\n")
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    for name in {*files, "tokenizer_config.json", "special_tokens_map.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes(), name
