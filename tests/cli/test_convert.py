"""maxlm convert: there and back, and a line for whatever is wrong with what it is
given, with nothing left behind."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import export_tokenizer, load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from tests.models.published import folder_of, golden

Change = Callable[[Path], object]
NORM = "model.layers.1.input_layernorm.weight"


def config(**values) -> Change:
    """config.json with other values; None: without them."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        new = json.loads(path.read_text()) | values
        path.write_text(
            json.dumps({key: value for key, value in new.items() if value is not None})
        )

    return change


def without_a_norm(folder: Path) -> None:
    tensors = {
        key: value for key, value in golden("llama").tensors.items() if key != NORM
    }
    shutil.rmtree(folder)
    folder_of("llama", folder, tensors)


def larger_tokenizer(folder: Path) -> None:
    tokenizer = train_tokenizer(
        TokenizerConfig(vocab_size=300), [bytes(range(32, 127)) * 9]
    )
    tokenizer.save(folder.parent / "tokenizer")
    export_tokenizer(load_tokenizer(folder.parent / "tokenizer"), folder)
    shutil.rmtree(folder.parent / "tokenizer")


# What is wrong with a Llama's folder, and what is said of it.
REFUSED: list[tuple[Change, str]] = [
    (
        config(architectures=["LLamaForCausalLM"]),
        "their/config.json: the architecture LLamaForCausalLM is not supported; did "
        "you "
        "mean LlamaForCausalLM?",
    ),
    (config(num_key_value_heads=4), "their/config.json: model.attention: ..."),
    (
        config(num_hidden_layers=None),
        "their/config.json: num_hidden_layers is missing; take it from the published "
        "model",
    ),
    (
        without_a_norm,
        f"their: the files lack {NORM}; check that the config is this model's",
    ),
    (
        larger_tokenizer,
        "their: the tokenizer has 300 ids, the model's table 97 rows; use the "
        "tokenizer that the "
        "model was trained with",
    ),
    (
        lambda folder: (folder / "config.json").unlink(),
        "their: neither config.json nor config.yaml here; name a Hugging Face "
        "checkpoint's folder, "
        "or a run's such as runs/demo",
    ),
    (
        lambda folder: (folder / "config.json").write_text('{"architectures": ["Llama'),
        "their/config.json: cannot be read (...); download it again",
    ),
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working directory, with a Llama in "their"."""
    monkeypatch.chdir(tmp_path)
    folder_of("llama", tmp_path / "their")
    return tmp_path


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refuses_and_leaves_the_disk_as_it_was(check_refused, home, change, message):
    change(home / "their")
    check_refused(home, ["convert", "their", "runs/mine"], message)


def test_targets_that_are_there(check_refused, home):
    (home / "runs/mine").mkdir(parents=True)
    (home / "runs/mine/notes.txt").write_text("keep")
    message = "runs/mine: not an empty folder; name a new one"
    check_refused(home, ["convert", "their", "runs/mine"], message)
    with contextlib.chdir(home / "runs"):
        Path("here").mkdir()
        os.chdir("here")
        message = ".: the folder that this runs in cannot be replaced; name another"
        check_refused(home, ["convert", "../../their", "."], message)
    check_refused(
        home, ["convert", "nowhere", "runs/other"], "nowhere: no such folder; ..."
    )


PARAMETERS = sum(tensor.size for tensor in golden("llama").tensors.values())
REFUSED_BACK = {
    "new --dtype int4": "no number format 'int4'; use one of float32, bfloat16, "
    "float16",
    "new --family lama": "no family 'lama'; did you mean llama?",
    "new --family gpt2": "config.yaml: model: GPT2LMHeadModel has no word for ...; "
    "name another "
    "--family, or change the model",
    "new --step 3": "runs/mine/checkpoints: no checkpoint of step 3; use one of 0",
    "new --shard-gb nan": "--shard-gb nan; use a number above 0",
    "again": "again: not an empty folder; name a new one",
}


def test_there_and_back(run, check_refused, home):
    code, out, _ = run("convert", "their", "runs/mine")
    assert code == 0
    assert out.splitlines() == [
        f"runs/mine: llama, {PARAMETERS:,} parameters, BF16",
        "  no tokenizer: there is no tokenizer.json or tokenizer.model beside it",
    ]
    code, out, _ = run("convert", "runs/mine", "again")
    assert (code, out) == (0, f"again: llama, {PARAMETERS:,} parameters, BF16\n")
    want = golden("llama").tensors
    got = load_file(home / "again/model.safetensors")
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == value.tobytes() for key, value in want.items())
    for arguments, message in REFUSED_BACK.items():
        check_refused(home, ["convert", "runs/mine", *arguments.split()], message)
    message = (
        "their: --dtype float32 says how a run is written, and this is a published ..."
    )
    check_refused(home, ["convert", "their", "new", "--dtype", "float32"], message)
