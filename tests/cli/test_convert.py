"""maxlm convert: there and back, and a line for whatever is wrong with what it is given, with
nothing left behind."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from maxlm.cli.main import main
from maxlm.data.tokenizer import TokenizerConfig, export_tokenizer, train_tokenizer
from tests.models.published import folder_of, golden

Change = Callable[[Path], None]
OTHER = "check that the config is this model's"
AGAIN = "download it again"


def config(**values) -> Change:
    """config.json with other values; None: without them."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        new = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in new.items() if value is not None}))

    return change


def tensors(**changed) -> Change:
    """Other tensors, with ``__`` for a dot; None: without them."""

    def change(folder: Path) -> None:
        named = {key.replace("__", "."): value for key, value in changed.items()}
        new = golden("llama").tensors | named
        shutil.rmtree(folder)
        folder_of("llama", folder, {key: value for key, value in new.items() if value is not None})

    return change


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


def indexed(name: str, file: str) -> Change:
    """An index instead, in which one tensor is said to be in ``file``."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        files = dict.fromkeys(golden("llama").tensors, "part.safetensors") | {name: file}
        index = json.dumps({"metadata": {}, "weight_map": files})
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def larger_tokenizer(folder: Path) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), [bytes(range(32, 127)) * 9])
    tokenizer.save(folder.parent / "tokenizer")
    export_tokenizer(folder.parent / "tokenizer", folder)
    shutil.rmtree(folder.parent / "tokenizer")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["Llama')


NORM = "model.layers.1.input_layernorm.weight"
ones = np.ones(30, np.float32)
# What is wrong with a Llama's folder → what is said of it.
REFUSED: dict[str, tuple[Change, str]] = {
    "a misspelt one": (
        config(architectures=["LLamaForCausalLM"]),
        "their/config.json: the architecture LLamaForCausalLM is not supported; did you "
        "mean LlamaForCausalLM?",
    ),
    "heads that do not go together": (
        config(num_key_value_heads=4),
        "their/config.json: model.attention: ...",
    ),
    "a setting that is missing": (
        config(num_hidden_layers=None),
        "their/config.json: num_hidden_layers is missing; take it from the published model",
    ),
    "a tensor too few": (
        tensors(**{NORM.replace(".", "__"): None}),
        f"their: the files lack {NORM}; {OTHER}",
    ),
    "a tensor too many": (
        tensors(model__layers__1__gate=ones),
        f"their: the files hold model.layers.1.gate, which this model does not use; {OTHER}",
    ),
    "a tensor of another shape": (
        tensors(**{NORM.replace(".", "__"): ones[:29]}),
        f"their/model.safetensors: {NORM} is [29] there, [30] in this model; {OTHER}",
    ),
    "a quantized tensor": (
        tensors(**{NORM.replace(".", "__"): ones.astype(np.int8)}),
        f"their/model.safetensors: {NORM} is stored as I8, so quantized; use the model in bf16, "
        "fp16 or fp32",
    ),
    "another vocabulary": (
        config(vocab_size=96),
        "their/model.safetensors: model.embed_tokens.weight is [97, 30] there, [96, 30] in this "
        f"model; {OTHER}",
    ),
    "a layer too many": (
        config(num_hidden_layers=2),
        "their: the files hold model.layers.2.input_layernorm.weight, ..., which this model does "
        f"not use; {OTHER}",
    ),
    "a tokenizer of more ids": (
        larger_tokenizer,
        "their: the tokenizer has 300 ids, the model's table 97 rows; use the tokenizer that the "
        "model was trained with",
    ),
    "a truncated file": (
        truncated,
        f"their/model.safetensors: no complete safetensors file (...); {AGAIN}",
    ),
    "a file of something else": (
        no_safetensors,
        f"their/model.safetensors: no complete safetensors file (...); {AGAIN}",
    ),
    "an index of a file that is not there": (
        indexed(NORM, "part2.safetensors"),
        f"their/part2.safetensors: no complete safetensors file (...); {AGAIN}",
    ),
    "pickles": (
        pickled,
        "their: pytorch_model.bin is a pickle, which can run any code when it is read; fetch the "
        "model as safetensors; or, only if you trust it, load it with transformers "
        "(from_pretrained) and write it with save_pretrained",
    ),
    "no config": (
        no_config,
        "their: neither config.json nor config.yaml here; name a Hugging Face checkpoint's folder, "
        "or a run's such as runs/demo",
    ),
    "half a config": (
        broken_config,
        f"their/config.json: cannot be read (...); {AGAIN}",
    ),
}


@pytest.fixture
def run(tmp_path, capfd, monkeypatch):
    """Runs ``maxlm convert ARGUMENTS`` beside a Llama in "their": (exit code, stdout, stderr)."""
    monkeypatch.delenv("MAXLM_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    folder_of("llama", tmp_path / "their")

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = main(("convert", *arguments))
        out, err = capfd.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def content(folder: Path) -> dict[Path, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def check_refused(run, folder: Path, arguments: list[str], message: str) -> None:
    before = content(folder)
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1), err
    begin, *rest = f"error: {message}".split("...")
    assert err[0].startswith(begin)
    assert not rest or err[0].endswith(rest[-1])
    assert rest or err[0] == begin
    assert content(folder) == before


@pytest.mark.parametrize("fault", REFUSED)
def test_refuses_and_leaves_the_disk_as_it_was(run, tmp_path, fault):
    change, message = REFUSED[fault]
    change(tmp_path / "their")
    check_refused(run, tmp_path, ["their", "runs/mine"], message)


def test_targets_that_are_there(run, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/notes.txt").write_text("keep")
    message = "runs/mine: not an empty folder; name a new one"
    check_refused(run, tmp_path, ["their", "runs/mine"], message)
    with contextlib.chdir(tmp_path / "runs"):
        Path("here").mkdir()
        os.chdir("here")
        message = ".: the folder that this runs in cannot be replaced; name another"
        check_refused(run, tmp_path, ["../../their", "."], message)
    message = "nowhere: no such folder; name a Hugging Face checkpoint's folder, or a run's such as"
    check_refused(run, tmp_path, ["nowhere", "runs/other"], f"{message} runs/demo")


PARAMETERS = sum(tensor.size for tensor in golden("llama").tensors.values())


def test_there_and_back(run, tmp_path):
    code, out, _ = run("their", "runs/mine")
    assert code == 0
    assert out == [
        f"runs/mine: llama, {PARAMETERS:,} parameters, BF16",
        "  no tokenizer: there is no tokenizer.json or tokenizer.model beside it",
    ]
    code, out, _ = run("runs/mine", "again")
    assert (code, out) == (0, [f"again: llama, {PARAMETERS:,} parameters, BF16"])
    want, got = golden("llama").tensors, load_file(tmp_path / "again/model.safetensors")
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == value.tobytes() for key, value in want.items())

    for arguments, message in REFUSED_BACK.items():
        check_refused(run, tmp_path, ["runs/mine", *arguments.split()], message)


REFUSED_BACK = {
    "new --dtype int4": "no number format 'int4'; use one of float32, bfloat16, float16",
    "new --family lama": "no family 'lama'; known are gpt2, llama, mistral, qwen2, ...",
    "new --family gpt2": "config.yaml: model: GPT2LMHeadModel has no word for ...; name another "
    "--family, or change the model",
    "new --step 3": "runs/mine/checkpoints: no checkpoint of step 3; use one of 0",
    "new --family mixtral": "config.yaml: model: MixtralForCausalLM has no word for its kind of "
    "layers; name another --family, or change the model",
    **{
        f"new --shard-gb {size}": f"--shard-gb {float(size)}; use a number above 0"
        for size in ("0", "-1", "nan", "inf")
    },
    "again": "again: not an empty folder; name a new one",
}


def test_choices_where_there_is_none(run, tmp_path):
    for option, value in (
        ("family", "llama"),
        ("dtype", "float32"),
        ("step", "3"),
        ("shard-gb", "1.5"),
    ):
        message = (
            f"their: --{option} {value} says how a run is written, and this is a published "
            "checkpoint; leave it out"
        )
        check_refused(run, tmp_path, ["their", "new", f"--{option}", value], message)


def test_values_that_a_format_cannot_hold(run, tmp_path):
    tensors(model__norm__weight=ones * 1e6)(tmp_path / "their")
    assert run("their", "mine")[0] == 0
    before = content(tmp_path)
    code, out, err = run("mine", "new/er", "--dtype", "float16")
    assert (code, out) == (2, [])
    assert err[-1] == (
        "error: model.norm.weight: values too large for float16; choose a number format of wider "
        "range"
    )
    assert content(tmp_path) == before
