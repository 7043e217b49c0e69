"""Runs of our own as published folders and back: parameters, number formats and
tokenizers come through bit for bit, and what no family computes is refused."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.data.tokenizer.load import import_tokenizer, load_tokenizer
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.huggingface.files import list_stored_tensors, read_tensor
from maxlm.models.params import flatten_names, param_specs
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.load import load_model, load_run
from maxlm.sharding import AxisRules, MeshConfig
from tests.errors import message
from tests.models import tiny_tokenizers
from tests.models.published import folder_of, golden
from tests.train import tiny

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
    tiny.train(path)
    return folder / "tiny"


def alike(run: Path, model: dict[str, Any]) -> Path:
    """A run beside it of another model, with random parameters."""
    folder = Path(tempfile.mkdtemp(dir=run.parent))
    config = load_config(RunConfig, run / "config.yaml").value
    config = RunConfig.model_validate(
        config.model_dump() | {"name": "other", "model": model}
    )
    specs = flatten_names(
        param_specs(config.model.build(rules=AxisRules(), dtype=np.float32))
    )
    random = np.random.default_rng(0)
    writer = RunCheckpointWriter(folder / "checkpoints")
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
    return jax.tree.map(np.asarray, flatten_names(load_run(folder).params))


@pytest.mark.heavy
def test_a_published_folder_is_used_without_conversion(llama, tmp_path):
    folder = tmp_path / "published"
    convert(llama, folder)
    before = sorted(folder.iterdir())
    for mesh in (None, MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=1, tensor=4)):
        ours, theirs = load_model(llama, mesh=mesh), load_model(folder, mesh=mesh)
        assert ours.tokenizer.encode("def é(x)") == theirs.tokenizer.encode("def é(x)")
        same = jax.tree.map(
            lambda a, b: (a.sharding == b.sharding, a, b), ours.params, theirs.params
        )
        for placed, one, other in jax.tree.leaves(
            same, is_leaf=lambda x: isinstance(x, tuple)
        ):
            assert placed
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert sorted(folder.iterdir()) == before
    assert "leave it out" in message(load_model, folder, step=3)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in message(load_model, folder)
    assert "neither config.yaml nor config.json" in message(load_model, tmp_path)
    assert "no such folder" in message(load_model, tmp_path / "none")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_there_and_back(llama, name, tmp_path):
    run = llama if name == "llama" else alike(llama, GPT2)
    done = convert(run, tmp_path / "published")
    assert (done.family, done.dtype) == (name, "F32")
    values = json.loads((tmp_path / "published/config.json").read_text())
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (values["bos_token_id"], values["eos_token_id"]) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    convert(tmp_path / "published", tmp_path / "again")

    want, got = parameters(run), parameters(tmp_path / "again")
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)
    first, again = (
        load_config(RunConfig, folder / "config.yaml").value.model
        for folder in (run, tmp_path / "again")
    )
    assert first.model_copy(update={"remat": again.remat}) == again
    there = load_tokenizer(tmp_path / "again/tokenizer")
    text = "the sun rises over a  quiet sea\n\tändert 42 <|bos|>"
    assert there.encode(text) == tokenizer.encode(text)
    assert there.decode(there.encode(text)) == text


def test_an_untied_classifier_without_a_language_head_is_read(llama, tmp_path):
    """As transformers saves one; tests/parity/test_reward.py compares the scores."""
    run = alike(llama, LLAMA | {"heads": {"score": 1}})
    convert(run, tmp_path / "published")
    (file,) = (tmp_path / "published").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    done = convert(tmp_path / "published", tmp_path / "read")
    assert any(note.startswith("no lm_head.weight") for note in done.notes)
    want, got = parameters(run), parameters(tmp_path / "read")
    assert want.keys() - got.keys() == {"head.kernel"}
    for key, value in got.items():
        np.testing.assert_array_equal(value, want[key], err_msg=key)
    convert(tmp_path / "read", tmp_path / "again")
    again = load_file(tmp_path / "again" / file.name)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    # Without a score there is nothing that it could be.
    del tensors["score.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "lack lm_head.weight, score.weight" in message(
        convert, tmp_path / "published", tmp_path / "none"
    )


def test_an_array_under_anothers_description_is_refused(llama, tmp_path):
    """Both hold as many numbers: read as it says, one would be written as the other's
    transpose."""
    run = alike(llama, LLAMA)
    state = run / "checkpoints/0/state"
    up, down = (state / f"params.layers.mlp.{name}.kernel" for name in ("up", "down"))
    first = up / "zarr.json"
    other = down / "zarr.json"
    text = first.read_bytes()
    first.write_bytes(other.read_bytes())
    other.write_bytes(text)
    text = message(convert, run, tmp_path / "out")
    assert (
        "layers.mlp.down.kernel is [2, 32, 64] there, [2, 64, 32] in the run's model"
        in text
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.more
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
    tiny.train(tuned)
    want, got = parameters(llama), parameters(tmp_path / "tiny")
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-7, err_msg=name)
    tiny.train(tuned, "train.steps=2")  # and resumed

    done = convert(tmp_path / "tiny", tmp_path / "out")
    assert (done.family, done.dtype) == ("mistral", "F32")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == "mistral"
    assert values["eos_token_id"] == [5, 1]


def test_a_model_of_no_family_is_refused(llama, tmp_path):
    run = alike(llama, OWN)
    before = sorted(tmp_path.rglob("*"))
    no_family = "no published family computes what this model does"
    with pytest.raises(MaxlmError, match=no_family):
        convert(run, tmp_path / "published")
    no_word = r"LlamaForCausalLM has no word for model\.\w+="
    with pytest.raises(MaxlmError, match=no_word) as caught:
        convert(run, tmp_path / "published", family="llama")
    text = str(caught.value)
    assert "placement='parallel'" in text or "embedding_scale=3.0" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_many_files_are_one_model(tmp_path):
    source = folder_of("deepseek_v2", tmp_path / "their")
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again", shard_bytes=30_000)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 3
    check_same_tensors(tmp_path / "again", golden("deepseek_v2").tensors)


def check_same_tensors(folder: Path, want: dict[str, np.ndarray]) -> None:
    got = {
        name: read_tensor(stored)
        for name, stored in list_stored_tensors(folder).items()
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].tobytes() == value.tobytes(), name


def test_a_tokenizers_files_come_back_byte_for_byte(llama, tmp_path):
    source = tmp_path / "their"
    convert(llama, source)
    files = {path.name for path in source.iterdir()} - {
        "config.json",
        "model.safetensors",
    }
    path = source / "tokenizer.json"  # as another program would have laid it out
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3) + "\n\n")
    roles = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "model_max_length": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(roles, indent=1))
    (source / "special_tokens_map.json").write_text("{ }\n")
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    for name in {*files, "tokenizer_config.json", "special_tokens_map.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (
            source / name
        ).read_bytes(), name


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["phi3", "deepseek_v2"])
def test_a_tied_head_may_be_stored_again(name, tmp_path):
    tensors = dict(golden(name).tensors)
    table = tensors["model.embed_tokens.weight"]
    for head, folder in ((table, "same"), (table[::-1].copy(), "other")):
        stored = tensors | {"lm_head.weight": head}
        folder_of(name, tmp_path / folder, stored, tie_word_embeddings=True)
    convert(tmp_path / "same", tmp_path / "run")
    assert load_config(
        RunConfig, tmp_path / "run/config.yaml"
    ).value.model.tie_embeddings
    convert(tmp_path / "run", tmp_path / "again")
    del tensors["lm_head.weight"]
    check_same_tensors(tmp_path / "again", tensors)
    with pytest.raises(
        MaxlmError, match=r"lm_head.weight differs from model.embed_tokens.weight"
    ):
        convert(tmp_path / "other", tmp_path / "run2")


def test_bart_without_its_head(tmp_path):
    """Its logits have no offsets, its names no prefix."""
    bare = dict(golden("bart").tensors)
    del bare["final_logits_bias"]
    their = {name.removeprefix("model."): value for name, value in bare.items()}
    source = folder_of("bart", tmp_path / "their", their, architectures=["BartModel"])
    convert(source, tmp_path / "run")
    assert not load_config(
        RunConfig, tmp_path / "run/config.yaml"
    ).value.model.head_bias
    convert(tmp_path / "run", tmp_path / "again")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert values["architectures"] == ["BartModel"]
    check_same_tensors(tmp_path / "again", bare)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_number_formats_come_back_under_usual_names(name, tmp_path):
    """Some published files leave a prefix out, or spell norms otherwise."""
    usual = dict(golden(name).tensors)
    exact = [key for key in usual if "ln_f" in key or "LayerNorm" in key]
    usual |= {
        key: np.linspace(-1, 1, usual[key].size, dtype=np.float32) for key in exact
    }

    def spelt(key: str) -> str:
        key = key.removeprefix("transformer.") if name == "gpt2" else key
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "Norm.bias", "Norm.beta"
        )

    folder_of(
        name, tmp_path / "their", {spelt(key): value for key, value in usual.items()}
    )
    assert {spelt(key) for key in exact}.isdisjoint(exact)
    convert(tmp_path / "their", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "again")
    check_same_tensors(tmp_path / "again", usual)
    assert (
        json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"
    )
    assert convert(tmp_path / "run", tmp_path / "half", dtype="float16").dtype == "F16"
    stored = list_stored_tensors(tmp_path / "half").values()
    assert {tensor.dtype for tensor in stored} == {"F16"}


def test_special_tokens_that_the_table_has_no_rows_for(tmp_path):
    source = folder_of("gemma3", tmp_path / "their")
    tiny_tokenizers.save(
        tiny_tokenizers.images(97), source, bos_token="<bos>", eos_token="<eos>"
    )
    assert import_tokenizer(source).vocab_size == 98
    done = convert(source, tmp_path / "run")
    assert done.notes == [
        "left out of the tokenizer: <image>, which the table has no row for"
    ]
    assert load_tokenizer(tmp_path / "run/tokenizer").vocab_size == 97
    convert(tmp_path / "run", tmp_path / "again")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(
    ("model", "generation", "want"),
    [([5, 9], {}, (1, 5, 9)), (1, {"eos_token_id": [7, 5, 300]}, (1, 7, 5))],
)
def test_every_end_token_is_kept(model, generation, want, tmp_path):
    source = folder_of("llama", tmp_path / "their", eos_token_id=model)
    tiny_tokenizers.save(tiny_tokenizers.t5(), source, eos_token="</s>")
    (source / "generation_config.json").write_text(json.dumps(generation))
    convert(source, tmp_path / "run")
    assert load_tokenizer(tmp_path / "run/tokenizer").stop_ids == want
    convert(tmp_path / "run", tmp_path / "again")
    again = [
        json.loads((tmp_path / "again" / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]
    assert (again[0]["eos_token_id"], again[1]) == (model, generation)


MARKS = {
    "bert": (tiny_tokenizers.bert, {"mask_id": 4}),
    "t5": (
        tiny_tokenizers.t5,
        {"first_sentinel": 60, "sentinels": tiny_tokenizers.SENTINELS},
    ),
}


@pytest.fixture(params=MARKS)
def marked(request, tmp_path):
    """A converted run, and the marks that its tokenizer has."""
    name = request.param
    make, marks = MARKS[name]
    source = folder_of(name, tmp_path / "their")
    tiny_tokenizers.save(make(), source, pad_token=make().id_to_token(0))
    if name == "bert":
        tiny_tokenizers.save(make(), source, bos_token="[CLS]", eos_token="[SEP]")
    done = convert(source, tmp_path / "run")
    assert not [note for note in done.notes if "marks" in note]
    return tmp_path / "run/config.yaml", marks


def test_a_converted_run_has_the_tokenizers_own_marks(marked):
    path, marks = marked
    task = load_config(RunConfig, path).value.task.model_dump()
    assert task | marks == task


@pytest.mark.more
def test_a_converted_run_goes_on_with_the_tokenizers_own_marks(marked, tmp_path):
    path, _ = marked
    text = tiny.write_text(tmp_path / "text")
    tiny.train(
        path,
        "name=tuned",
        f"train.start_from={tmp_path / 'run'}",
        f"data={{batch_size: 8, workers: 0, sources: [{{name: text, documents: "
        f"[{text}]}}]}}",
        "data.build_workers=1",
        "train.steps=1",
        "schedule={learning_rate: 1e-9, warmup_steps: 0}",
        "compilation_cache=null",
        "mesh.data=8",
    )
    want, got = parameters(tmp_path / "run"), parameters(tmp_path / "tuned")
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, atol=1e-6, err_msg=key)


def test_marks_that_there_is_no_room_for_are_told_of(tmp_path):
    source = folder_of("bart", tmp_path / "their")
    tiny_tokenizers.save(
        tiny_tokenizers.bert(), source, bos_token="[CLS]", eos_token="[SEP]"
    )
    assert convert(source, tmp_path / "run").notes[-1] == (
        "to train it, name ids for task.kind=span_corruption in task.first_sentinel: "
        "the tokenizer "
        "has none, and the table no rows to spare"
    )
