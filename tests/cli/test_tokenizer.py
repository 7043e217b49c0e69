"""``maxlm tokenizer``: its verbs through the real entry point."""

import io
import json
import sys

import pytest

from maxlm.cli.main import main


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


class Standard(io.TextIOWrapper):
    """Standard input with these bytes."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")


def test_text_piped_through_encode_and_decode_is_unchanged(trained, capfdbinary, monkeypatch):
    data = b" \xff\r\n<|user|> gr\xc3\xb6\xc3\x9fer\0 "
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "stdin", Standard(data))
    assert main(["tokenizer", "encode", str(trained), "-"]) == 0
    ids = capfdbinary.readouterr().out
    assert set(ids) <= set(b"0123456789 \n")
    assert b"299" not in ids.split()
    monkeypatch.setattr(sys, "stdin", Standard(ids))
    assert main(["tokenizer", "decode", str(trained)]) == 0
    assert capfdbinary.readouterr().out == data


def test_encode_an_argument_and_decode_arguments(trained, capfd):
    capfd.readouterr()
    assert main(["tokenizer", "encode", str(trained), "a<|user|>", "--allow-special"]) == 0
    ids = capfd.readouterr().out.split()
    assert len(ids) == 2
    assert ids[1] == "299"
    assert main(["tokenizer", "decode", str(trained), *ids]) == 0
    assert capfd.readouterr().out == "a<|user|>"


def test_stats(trained, corpus, capfd):
    capfd.readouterr()
    assert main(["tokenizer", "stats", str(trained), str(corpus), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["documents"] == 1
    assert found["bytes"] == corpus.stat().st_size
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    assert 0 < found["vocabulary_use"] <= 1
    assert main(["tokenizer", "stats", str(trained), str(corpus)]) == 0
    table = capfd.readouterr().out
    assert f"{found['tokens']:,}" in table
    assert "bytes per token" in table


def test_sentencepiece(corpus, tmp_path, capfd):
    out = tmp_path / "sp"
    arguments = ["--kind", "sentencepiece_unigram", "--vocab-size", "293", "--out", str(out)]
    assert main(["tokenizer", "train", str(corpus), *arguments]) == 0
    assert capfd.readouterr().out.startswith(f"{out}: sentencepiece_unigram, 293 tokens, ")
    assert {path.name for path in out.iterdir()} == {"tokenizer.model", "maxlm_tokenizer.json"}


def test_an_existing_tokenizer_is_kept_unless_forced(trained, corpus, capfd):
    capfd.readouterr()
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    arguments = ["tokenizer", "train", str(corpus), "--vocab-size", "280", "--out", str(trained)]
    assert main(arguments) == 2
    assert capfd.readouterr().err == (
        f"error: {trained}: there is a tokenizer here already; "
        "add --force to replace it, or choose another --out\n"
    )
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert main([*arguments, "--force"]) == 0
    assert ": bpe, 280 tokens, " in capfd.readouterr().out


def test_mistakes_are_one_line_and_leave_nothing(corpus, trained, tmp_path, capfd):
    out = tmp_path / "nothing"
    train = ["tokenizer", "train", str(corpus), "--out", str(out)]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = [
        (
            [*train, "--vocab-size", "100"],
            "vocab_size=100 has no room for every byte and special token; "
            "set it to 257 (256 bytes, 1 special) or more",
        ),
        (
            [*train, "--special", "a b"],
            "'a b' cannot be a special token; use 2 to 64 printable ASCII characters without "
            "spaces, other than <unk> and byte names such as <0x0A>",
        ),
        (
            ["tokenizer", "train", str(empty), "--out", str(out)],
            "no text to train a tokenizer on; give text that is not empty",
        ),
        (
            ["tokenizer", "encode", str(out), "x"],
            f"{out}: no such folder; name a folder that `maxlm tokenizer train` wrote",
        ),
        (
            ["tokenizer", "decode", str(trained), "12", "x1"],
            "'x1' is not a token id; give whole numbers from 0 on",
        ),
        (
            ["tokenizer", "decode", str(trained), "300"],
            "token id 300 is outside [0, 300); decode with the tokenizer that made the ids",
        ),
        (
            ["tokenizer", "stats", str(trained), str(empty)],
            "no text to measure; give files that are not empty",
        ),
    ]
    for arguments, text in cases:
        assert main(arguments) == 2
        errors = capfd.readouterr().err.splitlines()
        assert errors[-1] == f"error: {text}"
        assert not out.exists()


def test_compare_says_what_to_do_of_a_tokenizer_without_roles(tmp_path, corpus, trained, capfd):
    from tests.data.tokenizer.foreign import write_checkpoint

    path = write_checkpoint(tmp_path / "c", "smollm2") / "tokenizer.json"
    assert main(["tokenizer", "compare", str(trained), str(path), "--", str(corpus)]) == 2
    assert "(--eos of `maxlm tokenizer import`)" in capfd.readouterr().err


def test_import_and_export_of_a_checkpoints_tokenizer(tmp_path, capfd):
    from tests.data.tokenizer.foreign import write_checkpoint

    checkpoint, kept = write_checkpoint(tmp_path / "checkpoint", "llama2"), tmp_path / "kept"
    assert main(["tokenizer", "import", str(checkpoint), "--out", str(kept)]) == 0
    assert "not every text comes back" in capfd.readouterr().out
    assert main(["tokenizer", "import", str(checkpoint), "--out", str(kept)]) == 2
    assert "there is a tokenizer here already" in capfd.readouterr().err
    assert main(["tokenizer", "import", str(checkpoint), "--out", str(kept), "--force"]) == 0
    capfd.readouterr()
    assert main(["tokenizer", "encode", str(kept), "the fox"]) == 0
    ids = capfd.readouterr().out.split()
    assert main(["tokenizer", "decode", str(kept), *ids]) == 0
    assert capfd.readouterr().out == "the fox"
    assert main(["tokenizer", "export", str(kept), "--out", str(tmp_path / "out")]) == 0
    (checkpoint / "config.json").unlink()
    for path in checkpoint.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
