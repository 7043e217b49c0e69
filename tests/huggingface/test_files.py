"""Safetensors files: beside the library's own reader and writer, and every way a folder
can be bad."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from maxlm.huggingface import files
from maxlm.huggingface.files import (
    NUMPY,
    SafetensorsWriter,
    iterate_flat_chunks,
    list_stored_tensors,
    read_tensor,
)
from tests.errors import message

BY_LIBRARY = [name for name in NUMPY if not name.startswith(("BF", "F8"))]
NAMES = {NUMPY[name]: name for name in NUMPY}
KINDS = st.tuples(st.sampled_from(BY_LIBRARY), st.lists(st.integers(0, 6), max_size=4))


def numbers(seed, dtype, shape):
    """Any bits, as values of a format."""
    bits = np.random.default_rng(seed).integers(
        0, 256, (*shape, dtype.itemsize), np.uint8
    )
    return (
        (bits & 1).astype(bool)[..., 0]
        if dtype.kind == "b"
        else bits.view(dtype)[..., 0]
    )


def same_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@given(
    kinds=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        KINDS,
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 9),
)
def test_reads_what_the_library_writes(tmp_path_factory, kinds, seed):
    folder = tmp_path_factory.mktemp("hub")
    want = {name: numbers(seed, NUMPY[d], tuple(s)) for name, (d, s) in kinds.items()}
    save_file(want, folder / "model.safetensors", {"format": "pt"})
    tensors = list_stored_tensors(folder)
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        name: (dtype, tuple(shape)) for name, (dtype, shape) in kinds.items()
    }
    for name, stored in tensors.items():
        same_bits(read_tensor(stored), want[name])


def test_reads_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    kinds = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    want = {name: numbers(1, NUMPY[name], (3, 5)) for name in kinds}
    tensors = {
        name: torch.from_numpy(want[name].view(f"u{want[name].itemsize}")).view(
            getattr(torch, kind)
        )
        for name, kind in kinds.items()
    }
    save(tensors, tmp_path / "model.safetensors")
    for name, stored in list_stored_tensors(tmp_path).items():
        same_bits(read_tensor(stored), want[name])
        got = read_tensor(stored, np.dtype(np.float32))
        np.testing.assert_array_equal(got, tensors[name].to(torch.float32).numpy())


def test_reads_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SLAB_BYTES", 28)
    want = numbers(0, np.dtype(np.float16), (9, 5))
    save_file({"first": np.ones(3), "a": want}, tmp_path / "model.safetensors")
    stored = list_stored_tensors(tmp_path)["a"]
    assert [len(piece) for piece in iterate_flat_chunks(stored)] == [14, 14, 14, 3]
    same_bits(read_tensor(stored), want)
    same_bits(read_tensor(stored, np.dtype(np.float32)), want.astype(np.float32))


@given(
    kinds=st.lists(KINDS, min_size=1, max_size=8),
    shard_bytes=st.integers(1, 600),
    turned=st.booleans(),
)
def test_the_library_reads_what_was_written(
    tmp_path_factory, kinds, shard_bytes, turned
):
    folder = tmp_path_factory.mktemp("out")
    random = np.random.default_rng(len(kinds))
    arrays = {}
    for i, (dtype, shape) in enumerate(kinds):
        values = random.integers(0, 2, shape).astype(NUMPY[dtype])
        arrays[f"layer.{i}"] = values.T if turned else values
    kinds_by_name = {
        name: (NAMES[array.dtype], array.shape) for name, array in arrays.items()
    }
    writer = SafetensorsWriter(folder, kinds_by_name, shard_bytes)
    for name in reversed(arrays):
        writer.write(name, arrays[name])
    got = {}
    written = sorted(folder.glob("*.safetensors"))
    for number, file in enumerate(written, 1):
        part = load_file(file)
        if len(part) > 1:
            assert sum(array.nbytes for array in part.values()) <= shard_bytes
        got |= part
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        if len(written) > 1:
            assert file.name == f"model-{number:05}-of-{len(written):05}.safetensors"
    for name, want in arrays.items():
        assert got[name].dtype == want.dtype
        assert got[name].shape == want.shape
        np.testing.assert_array_equal(got[name], want)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(written) > 1)
    if len(written) > 1:
        total = sum(array.nbytes for array in arrays.values())
        assert json.loads(index.read_text())["metadata"] == {"total_size": total}
    stored = list_stored_tensors(folder)
    assert set(stored) == set(arrays)
    for tensor in stored.values():  # aligned, narrower ones beside them or not
        assert tensor.offset % NUMPY[tensor.dtype].itemsize == 0


def test_another_shape_than_announced_is_an_error(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": ("F32", (3, 2))})
    assert message(writer.write, "a", np.ones((2, 3), np.float32)) == (
        "a: is [2, 3] in the checkpoint, not [3, 2]; use the config it was trained with"
    )


def write_shards(folder, weight_map, **contents):
    for file, names in contents.items():
        save_file({name: np.ones(2) for name in names}, folder / f"{file}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_shards_with_tensors_that_the_index_forgot(tmp_path):
    a, b = "one.safetensors", "two.safetensors"
    write_shards(tmp_path, {"x": a, "y": b}, one="xz", two="y")
    tensors = list_stored_tensors(tmp_path)
    assert {name: t.path.name for name, t in tensors.items()} == {
        "x": a,
        "y": b,
        "z": a,
    }
    same_bits(read_tensor(tensors["z"]), np.ones(2))


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "length", "reason"),
    [
        ({"a": TENSOR}, 6, None, "incomplete metadata"),
        ({"a": TENSOR}, 8, 10**12, "header too large"),
        (b"{garbled", 8, None, "invalid JSON"),
        ({"a": TENSOR | {"shape": [3]}}, 8, None, "invalid shape"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, header, size, length, reason):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    path = tmp_path / "model.safetensors"
    path.write_bytes(prefix + text + bytes(size))
    got = message(list_stored_tensors, tmp_path)
    assert got.startswith(f"{path}: no complete safetensors file ({reason}")
    assert got.endswith("; download it again")


def test_a_format_that_numpy_lacks_is_an_error(tmp_path):
    text = json.dumps(
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(4)
    )
    got = message(list_stored_tensors, tmp_path)
    assert "a is stored as F4; use a version stored as one of F64, F32" in got


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (
            {"x": "lost.safetensors"},
            "lost.safetensors: no complete safetensors file (No such file",
        ),
        (3, "model.safetensors.index.json: no index of safetensors files"),
        ({"x": 3}, "model.safetensors.index.json: no index of safetensors files"),
        (
            {"x": "../other/one.safetensors"},
            f"{INDEX}: the index names '../other/one.safet",
        ),
        (
            {"x": "/etc/passwd"},
            f"{INDEX}: the index names '/etc/passwd', which is no file in its",
        ),
        (
            {"x": ".."},
            f"{INDEX}: the index names '..', which is no file in its own folder",
        ),
    ],
)
def test_an_index_that_does_not_agree_is_an_error(tmp_path, weight_map, reason):
    write_shards(tmp_path, weight_map, one="x")
    assert message(list_stored_tensors, tmp_path).startswith(f"{tmp_path}/{reason}")


def test_deep_indices_and_named_pipes_are_errors(tmp_path):
    index = tmp_path / INDEX
    index.write_text('{"weight_map": ' + "[" * 5000 + "]" * 5000 + "}")
    assert "nested deeper than 100 levels" in message(list_stored_tensors, tmp_path)
    index.write_text('{"weight_map": {"x": "one.safetensors"}}')
    os.mkfifo(tmp_path / "one.safetensors")
    # Opened, it would wait for a writer until the test's own limit of time.
    assert "one.safetensors: neither a file nor" in message(
        list_stored_tensors, tmp_path
    )


def test_folders_without_safetensors_are_errors_and_pickles_are_not_read(tmp_path):
    got = message(list_stored_tensors, tmp_path / "missing")
    assert got.startswith(f"{tmp_path}/missing: no folder here")
    assert "neither model.safetensors nor" in message(list_stored_tensors, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert message(list_stored_tensors, tmp_path) == (
        f"{tmp_path}: pytorch_model.bin is a pickle, which can run any code when it is "
        f"read; fetch "
        "the model as safetensors; or, only if you trust it, load it with transformers "
        "(from_pretrained) and write it with save_pretrained"
    )
