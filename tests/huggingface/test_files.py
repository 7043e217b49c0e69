"""Reading safetensors: beside the library's own writer, and every way a folder can be bad."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from maxlm.config import MaxlmError
from maxlm.huggingface import files
from maxlm.huggingface.dtypes import NUMPY
from maxlm.huggingface.files import iterate_pieces, list_stored_tensors, read_tensor

BY_LIBRARY = [name for name in NUMPY if not name.startswith(("BF", "F8"))]


def numbers(seed, dtype, shape):
    """Any bits, as values of a format."""
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return (bits & 1).astype(bool)[..., 0] if dtype.kind == "b" else bits.view(dtype)[..., 0]


def same_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@given(
    kinds=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(BY_LIBRARY), st.lists(st.integers(0, 6), max_size=4)),
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
    assert [len(piece) for piece in iterate_pieces(stored)] == [14, 14, 14, 3]
    same_bits(read_tensor(stored), want)
    same_bits(read_tensor(stored, np.dtype(np.float32)), want.astype(np.float32))


def shards(folder, weight_map, **contents):
    for file, names in contents.items():
        save_file({name: np.ones(2) for name in names}, folder / f"{file}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_shards(tmp_path):
    a, b = "one.safetensors", "two.safetensors"
    shards(tmp_path, {"x": a, "y": b, "z": a}, one="xz", two="y")
    tensors = list_stored_tensors(tmp_path)
    assert {name: t.path.name for name, t in tensors.items()} == {"x": a, "y": b, "z": a}
    same_bits(read_tensor(tensors["z"]), np.ones(2))


def test_a_tensor_that_the_index_forgot_is_there_all_the_same(tmp_path):
    shards(tmp_path, {"x": "one.safetensors"}, one="xz")
    assert set(list_stored_tensors(tmp_path)) == {"x", "z"}


def message(folder):
    with pytest.raises(MaxlmError) as error:
        list_stored_tensors(folder)
    text = str(error.value)
    assert "\n" not in text
    assert "; " in text, "says what to do"
    return text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


@pytest.mark.parametrize(
    ("header", "size", "length", "reason"),
    [
        ({"a": TENSOR}, 6, None, "incomplete metadata"),
        ({"a": TENSOR}, 8, 10**12, "header too large"),
        (b"{garbled", 8, None, "invalid JSON"),
        ({"a": TENSOR, "b": SECOND | {"data_offsets": [4, 12]}}, 12, None, "invalid offset"),
        ({"a": TENSOR | {"shape": [3]}}, 8, None, "invalid shape"),
        ({"a": TENSOR | {"dtype": "Q4"}}, 8, None, "invalid JSON in header: unknown variant `Q4`"),
        ({"a": TENSOR | {"shape": [2**40, 2**40]}}, 8, None, "overflow"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, header, size, length, reason):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    path = tmp_path / "model.safetensors"
    path.write_bytes(prefix + text + bytes(size))
    got = message(tmp_path)
    assert got.startswith(f"{path}: no complete safetensors file ({reason}")
    assert got.endswith("; download it again")


def test_a_format_that_numpy_lacks_is_an_error(tmp_path):
    text = json.dumps({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "a is stored as F4; use a version stored as one of F64, F32" in message(tmp_path)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(9)}, path)
    stored = list_stored_tensors(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MaxlmError, match="it ends within a"):
        read_tensor(stored)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"x": "lost.safetensors"}, "names lost.safetensors, which is missing; download"),
        ({"x": "../one.safetensors"}, "names '../one.safetensors', which is no file here"),
        (
            {"x": "one.safetensors", "w": "one.safetensors"},
            "says that w is in one.safetensors, which lacks it; download",
        ),
        (
            {"x": "one.safetensors", "y": "one.safetensors", "z": "two.safetensors"},
            "says that y is in one.safetensors, which lacks it; download",
        ),
        ({"x": 3}, "no index of safetensors files"),
    ],
)
def test_an_index_that_does_not_agree_is_an_error(tmp_path, weight_map, reason):
    shards(tmp_path, weight_map, one="x", two="yz")
    assert message(tmp_path).startswith(f"{tmp_path}/model.safetensors.index.json: {reason}")


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    shards(tmp_path, {"x": "one.safetensors", "y": "two.safetensors"}, one="x", two="xy")
    assert "x is in two files, one.safetensors and two.safetensors" in message(tmp_path)


def test_an_index_beside_a_whole_file_is_an_error(tmp_path):
    shards(tmp_path, {"x": "model.safetensors"}, model="x")
    assert "both model.safetensors and model.safetensors.index.json; remove" in message(tmp_path)


def test_folders_without_safetensors_are_errors(tmp_path):
    assert message(tmp_path / "missing").startswith(f"{tmp_path}/missing: no folder here")
    assert "no model.safetensors here" in message(tmp_path)
    save_file({"a": np.ones(2)}, tmp_path / "adapter.safetensors")
    assert "safetensors files, but neither model.safetensors nor" in message(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert message(tmp_path) == (
        f"{tmp_path}: {name} is a pickle, which can run any code when it is read; fetch the model "
        "as safetensors; or, only if you trust it, load it with transformers (from_pretrained) "
        "and write it with save_pretrained"
    )
