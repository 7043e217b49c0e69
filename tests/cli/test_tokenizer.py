"""``maxlm tokenizer``: its verbs through the real entry point."""

import io
import json
import sys

import pytest

from maxlm.cli.main import main
from tests.data.tokenizer.foreign import write_checkpoint


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"line {i}: the quick brown fox, größer {i * i}\n" for i in range(200)]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def trained(corpus, tmp_path):
    out = tmp_path / "t"
    arguments = ["--vocab-size", "300", "--out", str(out), "--special", "<|user|>"]
    assert main(["tokenizer", "train", str(corpus), *arguments]) == 0
    return out


def test_text_piped_through_encode_and_decode_is_unchanged(
    trained, capfdbinary, monkeypatch
):
    data = b" \xff\r\n<|user|> gr\xc3\xb6\xc3\x9fer\0 "
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["tokenizer", "encode", str(trained), "-"]) == 0
    ids = capfdbinary.readouterr().out
    assert set(ids) <= set(b"0123456789 \n")
    assert b"299" not in ids.split()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ids)))
    assert main(["tokenizer", "decode", str(trained)]) == 0
    assert capfdbinary.readouterr().out == data


def test_encode_an_argument_and_decode_arguments(trained, run):
    ids = run(
        "tokenizer", "encode", trained, "a<|user|>", "--allow-special"
    ).out.split()
    assert (len(ids), ids[1]) == (2, "299")
    assert run("tokenizer", "decode", trained, *ids).out == "a<|user|>"


def test_stats(trained, corpus, run):
    found = json.loads(run("tokenizer", "stats", trained, corpus, "--json").out)
    assert found["documents"] == 1
    assert found["bytes"] == corpus.stat().st_size
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    assert 0 < found["vocabulary_use"] <= 1
    table = run("tokenizer", "stats", trained, corpus).out
    assert f"{found['tokens']:,}" in table
    assert "bytes per token" in table


def test_an_existing_tokenizer_is_kept_unless_forced(
    trained, corpus, run, check_refused
):
    arguments = [
        "tokenizer",
        "train",
        str(corpus),
        "--vocab-size",
        "280",
        "--out",
        str(trained),
    ]
    message = "there is a tokenizer here already; add --force to replace it, or choose another"
    check_refused(trained, arguments, f"{trained}: {message} --out")
    assert ": bpe, 280 tokens, " in run(*arguments, "--force").out


MISTAKES = {
    "train text.txt --out nothing --vocab-size 100": "vocab_size=100 has no room for "
    "every byte "
    "and special token; set it to 257 (256 bytes, 1 special) or more",
    "train empty.txt --out nothing": "no text to train a tokenizer on; give text that "
    "is not empty",
    "encode nothing x": "nothing: no such folder; name a folder that `maxlm tokenizer "
    "train` wrote",
    "train text.txt --out nothing --lowercase": "a tokenizer of kind bpe keeps case; "
    "leave "
    "lowercase out, or set kind to wordpiece",
    "export nothing --out nothing": "nothing: no such folder; name a folder that "
    "`maxlm tokenizer train` wrote",
    "decode t 12 x1": "'x1' is not a token id; give whole numbers from 0 on",
    "decode t 300": "token id 300 is outside [0, 300); decode with the tokenizer that "
    "made the ids",
    "stats t empty.txt": "no text to measure; give files that are not empty",
}


def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    for arguments, text in MISTAKES.items():
        code, _, err = run("tokenizer", *arguments.split())
        assert (code, err.splitlines()[-1]) == (2, f"error: {text}")
        assert not (tmp_path / "nothing").exists()


def test_import_and_export_of_a_checkpoints_tokenizer(tmp_path, run):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama2")
    kept = tmp_path / "kept"
    take = ["tokenizer", "import", checkpoint, "--out", kept]
    assert "not every text comes back" in run(*take).out
    assert "there is a tokenizer here already" in run(*take).err
    assert run(*take, "--force").code == 0
    ids = run("tokenizer", "encode", kept, "the fox").out.split()
    assert run("tokenizer", "decode", kept, *ids).out == "the fox"
    out = tmp_path / "exported"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"stays")
    assert run("tokenizer", "export", kept, "--out", out).code == 0
    (checkpoint / "config.json").unlink()
    for path in checkpoint.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()
        assert (out / path.name).read_bytes() == path.read_bytes()
    exported = {path.name for path in out.iterdir()}
    assert exported == {path.name for path in checkpoint.iterdir()} | {
        "model.safetensors"
    }
