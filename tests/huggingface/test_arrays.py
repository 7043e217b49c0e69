"""Slices of arrays: cut into bounded files and tiles, and the same when read back."""

import math

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.huggingface import arrays
from maxlm.huggingface.arrays import (
    FILE_BYTES,
    TILE_BYTES,
    choose_chunk_and_shard_shapes,
    create_array,
    open_array,
)

sides = st.integers(1, 200_000)


@given(st.lists(sides, max_size=4))
def test_files_are_whole_tiles_and_both_are_bounded(shape):
    tile, file = choose_chunk_and_shard_shapes(tuple(shape))
    assert 4 * math.prod(tile) <= TILE_BYTES
    assert 4 * math.prod(file) <= FILE_BYTES
    assert all(f % t == 0 for f, t in zip(file, tile, strict=True))
    # Few files: none is far smaller than it may be, unless the slice is.
    whole = 4 * math.prod(shape)
    assert 4 * math.prod(file) >= min(whole, FILE_BYTES // 8)


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    lead=st.integers(0, 2),
    turned=st.booleans(),
)
def test_slices_come_back(tmp_path_factory, shape, lead, turned):
    folder = tmp_path_factory.mktemp("arrays")
    lead = min(lead, len(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "TILE_BYTES", 24)
        patch.setattr(arrays, "FILE_BYTES", 100)
        array = create_array(folder / "a", tuple(shape), lead)
        random = np.random.default_rng(0).normal(size=shape)
        want = np.array(
            np.maximum(random, 0), np.float32
        )  # zeros are stored like all else
        for index in np.ndindex(*shape[:lead]):
            values = np.asarray(want[index])
            array.write(index, values.T.copy().T if turned else values)
        read = open_array(folder, "a")
        np.testing.assert_array_equal(read.read(), want)
        for index in np.ndindex(*shape[:lead]):
            np.testing.assert_array_equal(read.read(index), want[index])
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/a/"}}
    np.testing.assert_array_equal(ts.open(spec).result().read().result(), want)


def test_what_was_not_written_is_an_error(tmp_path):
    array = create_array(tmp_path / "a", (2, 3), 1)
    array.write((0,), np.zeros(3, np.float32))
    read = open_array(tmp_path, "a")
    np.testing.assert_array_equal(read.read((0,)), np.zeros(3))
    with pytest.raises(
        MaxlmError, match=f"{tmp_path}/a: array error: .*; check the disk"
    ):
        read.read((1,))
