"""Writing safetensors: beside the library's own reader; whole or not at all."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from maxlm.config import MaxlmError
from maxlm.huggingface.dtypes import NUMPY
from maxlm.huggingface.files import list_stored_tensors, read_tensor
from maxlm.huggingface.writer import PARTIAL, SafetensorsWriter

BY_LIBRARY = [name for name in NUMPY if not name.startswith(("BF", "F8"))]
NAMES = {NUMPY[name]: name for name in NUMPY}


def write(folder, arrays, shard_bytes=10**9, **how):
    kinds = {name: (NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(folder, kinds, shard_bytes, **how) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
        writer.commit()


def ones(*names, size=3):
    return {name: np.full(size, ord(name), np.float32) for name in names}


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(BY_LIBRARY), st.lists(st.integers(0, 6), max_size=4)),
        min_size=1,
        max_size=8,
    ),
    shard_bytes=st.integers(1, 600),
    turned=st.booleans(),
)
def test_the_library_reads_what_was_written(tmp_path_factory, kinds, shard_bytes, turned):
    folder = tmp_path_factory.mktemp("out") / "new"
    random = np.random.default_rng(len(kinds))
    arrays = {}
    for i, (dtype, shape) in enumerate(kinds):
        values = random.integers(0, 2, shape).astype(NUMPY[dtype])
        arrays[f"layer.{i}"] = values.T if turned else values
    write(folder, arrays, shard_bytes)
    got, files = {}, sorted(folder.glob("*.safetensors"))
    for file in files:
        part = load_file(file)
        size = sum(array.nbytes for array in part.values())
        assert size <= shard_bytes or len(part) == 1
        got |= part
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert got.keys() == arrays.keys()
    for name, want in arrays.items():
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got[name], want)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if len(files) > 1:
        assert json.loads(index.read_text())["metadata"] == {
            "total_size": sum(array.nbytes for array in arrays.values())
        }
    assert set(list_stored_tensors(folder)) == set(arrays)
    assert len(list(folder.iterdir())) == len(files) + (len(files) > 1)


def test_tensors_lie_aligned_after_narrower_ones(tmp_path):
    arrays = {"a": np.ones(3, np.uint8), "b": np.ones(2), "c": np.ones(5, np.float16)}
    write(tmp_path / "new", arrays)
    for stored in list_stored_tensors(tmp_path / "new").values():
        assert stored.offset % NUMPY[stored.dtype].itemsize == 0


def test_shards_are_named_and_filled_in_order(tmp_path):
    write(tmp_path / "new", ones(*"abcde"), shard_bytes=24)
    files = {name: t.path.name for name, t in list_stored_tensors(tmp_path / "new").items()}
    numbers = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3}
    assert files == {name: f"model-0000{i}-of-00003.safetensors" for name, i in numbers.items()}


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.mkdir()

    def fail(folder):
        with SafetensorsWriter(folder, {"a": ("F32", (3,)), "b": ("F32", (3,))}, 12) as writer:
            writer.write("a", np.ones(3, np.float32))
            raise ZeroDivisionError

    for folder in (kept, new):
        with pytest.raises(ZeroDivisionError):
            fail(folder)
    assert not list(kept.iterdir())
    assert not new.exists()


def test_no_file_has_its_name_before_all_is_written(tmp_path):
    with SafetensorsWriter(tmp_path, {"a": ("F32", (3,))}) as writer:
        writer.write("a", np.ones(3, np.float32))
        with pytest.raises(MaxlmError, match=r"no model\.safetensors here"):
            list_stored_tensors(tmp_path)
        writer.commit()
    assert set(list_stored_tensors(tmp_path)) == {"a"}


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MaxlmError) as error:
        write(tmp_path, ones("a"))
    assert str(error.value) == (
        f"{tmp_path}: the folder is not empty; choose another, or ask for it to be overwritten"
    )
    with pytest.raises(MaxlmError, match="a file, not a folder"):
        write(tmp_path / "notes.txt", ones("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_leftovers_of_a_killed_writer_do_not_count(tmp_path):
    for name in (".model-00001-of-00002.safetensors", "scratch"):
        (tmp_path / f"{name}{PARTIAL}").write_text("half")
    write(tmp_path, ones("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path):
    write(tmp_path, ones(*"abcde"), shard_bytes=24)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, ones(*"xyz"), shard_bytes=24, overwrite=True)
    assert set(list_stored_tensors(tmp_path)) == {"x", "y", "z"}
    write(tmp_path, ones("q"), overwrite=True)
    np.testing.assert_array_equal(read_tensor(list_stored_tensors(tmp_path)["q"]), ones("q")["q"])
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "model.safetensors"}
    write(tmp_path, ones(*"ab"), shard_bytes=12, overwrite=True)
    assert set(list_stored_tensors(tmp_path)) == {"a", "b"}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MaxlmError, match=r"safetensors cannot be written \(.*\); free some space"):
        write(tmp_path / "file" / "new", ones("a"))


def test_another_shape_than_announced_is_an_error(tmp_path):
    with pytest.raises(MaxlmError) as error:  # noqa: SIM117
        with SafetensorsWriter(tmp_path / "new", {"a": ("F32", (3, 2))}) as writer:
            writer.write("a", np.ones((2, 3), np.float32))
    assert str(error.value) == (
        "a: is [2, 3] in the checkpoint, not [3, 2]; use the config it was trained with"
    )
