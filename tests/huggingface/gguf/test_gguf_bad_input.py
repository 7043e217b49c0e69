"""Bad GGUF files are one line that says what is wrong and what to do."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf import library
from maxlm.huggingface.gguf.container import read_gguf
from maxlm.huggingface.gguf.reading import open_gguf_model
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from maxlm.run.convert import convert
from maxlm.run.load import load_model
from tests.errors import message
from tests.huggingface.gguf.files import list_llama_shapes
from tests.huggingface.gguf.test_gguf_tensors import METADATA

pytest.importorskip("gguf")


def write(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A small file; ``changes``: values by keys with ``__`` for dots, None: left out."""
    metadata = {**METADATA, "llama.expert_count": 0}
    for key, value in changes.items():
        metadata[key.replace("__", ".")] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    shapes = list_llama_shapes(1, 64, 96, 4, 2, 40)
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    writer = GgufFileWriter(path, architecture, metadata, specs)
    for name, shape in shapes.items():
        writer.write(name, np.zeros(shape, np.float32))
    return path


def test_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    assert "No such file" in message(open_gguf_model, path)
    path.write_bytes(b"")
    assert (
        message(open_gguf_model, path) == f"{path}: not a GGUF file; name a GGUF file"
    )
    path.write_bytes(b"PK\x03\x04 a zip file")
    assert "not a GGUF file" in message(load_model, path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3))
    assert "big-endian" in message(open_gguf_model, path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1))
    assert "GGUF version 1 is not read" in message(open_gguf_model, path)


def test_truncated_anywhere(tmp_path):
    """A file cut off at any place is refused, and leaves no run behind."""
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    for length in np.linspace(8, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        assert "damaged GGUF file (it ends within" in message(
            convert, path, tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_damaged_bytes_never_end_in_a_traceback(tmp_path):
    """A header with any byte changed is read, or refused in one line."""
    data = bytearray(write(tmp_path / "whole.gguf").read_bytes()[:1500])
    path = tmp_path / "model.gguf"
    lines: list[str] = []
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged + bytes(300_000))
        try:
            open_gguf_model(path)
        except MaxlmError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)


def test_unknown_architectures_and_types(tmp_path):
    path = write(tmp_path / "model.gguf", "lama")
    assert "the architecture 'lama' is not supported; did you mean llama?" in message(
        open_gguf_model, path
    )
    path = write(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    # Behind the name: two dimensions, their sizes, and the type.
    place = data.index(name) + len(name) + 4 + 16
    data[place : place + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    text = message(open_gguf_model, path)
    assert "blk.0.attn_q.weight has the number format 999, which is unknown" in text


def test_missing_keys_and_tokenizers(tmp_path):
    path = write(tmp_path / "a.gguf", llama__block_count=None)
    assert "its metadata lacks llama.block_count" in message(open_gguf_model, path)
    path = write(tmp_path / "b.gguf", llama__rope__scaling__type="dynamic")
    assert "llama.rope.scaling.type='dynamic' is not implemented" in message(
        open_gguf_model, path
    )
    path = write(tmp_path / "c.gguf", llama__attention__head_count=7)
    assert "no whole number of heads" in message(open_gguf_model, path)
    path = write(tmp_path / "d.gguf")
    assert "this GGUF file has no tokenizer" in message(load_model, path)
    tokenizer = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__tokens": ["a", "b", "ab", "<e>"],
        "tokenizer__ggml__merges": ["a b"],
        "tokenizer__ggml__pre": "lama-bpe",
        "tokenizer__ggml__eos_token_id": 3,
    }
    path = write(tmp_path / "e.gguf", **tokenizer)
    text = message(load_model, path)
    assert "tokenizer.ggml.pre='lama-bpe' is not implemented" in text
    assert "llama-bpe" in text
    path = write(tmp_path / "f.gguf", **{**tokenizer, "tokenizer__ggml__model": "bert"})
    assert "tokenizer.ggml.model='bert' is not implemented" in message(load_model, path)


def test_the_package_gguf_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    text = message(read_gguf, path)
    assert text == 'GGUF files need the package gguf; pip install "maxlm[gguf]"'
    assert library.SUFFIX == ".gguf"
