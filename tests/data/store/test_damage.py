"""A bit that flips on the disk is an error that names the file, and is never read as a token."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.store import TokenStore, arrays


@pytest.fixture
def store(appended):
    return TokenStore.open(appended)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def read_all(store):
    opened = TokenStore.open(store.path)
    return opened.offsets, opened.read(0, opened.num_tokens)


@pytest.mark.parametrize(
    ("file", "at", "lost"),
    [
        ("tokens/c/1", 5, "chunk 0 (tokens 512 to 575)"),
        ("tokens/c/3", -3, "the index of its chunks (tokens 1,536 to 1,607)"),
        ("segments/000002/tokens/c/2", 5, "chunk 0 (tokens 4,240 to 4,303)"),
        ("segments/000001/offsets/c/0", 5, "chunk 0 (offsets 40 to 80)"),
    ],
)
def test_the_file_the_chunk_and_what_is_lost_are_named(store, file, at, lost):
    flip(store.path / file, at)
    with pytest.raises(MaxlmError) as caught:
        read_all(store)
    path = re.escape(f"{store.path / file}: cannot read {lost}: ")
    advice = "put an undamaged copy of the file there, or build the store again"
    assert re.fullmatch(f"{path}.+; {advice} .*", str(caught.value))


def test_stores_without_checksums_read_as_before(store):
    """The first segment has chunks as older versions wrote them."""
    expected = read_all(store)
    for name, values in (("offsets", expected[0][:41]), ("tokens", expected[1][:1608])):
        path = store.path / name / "zarr.json"
        metadata = json.loads(path.read_text())
        assert metadata["codecs"][0]["configuration"]["codecs"].pop() == {"name": "crc32c"}
        shutil.rmtree(path.with_name("c"))
        path.write_text(json.dumps(metadata))
        arrays.write_array(arrays.open_for_writing(store.path, name), 0, values, store.path)
    for now, before in zip(read_all(store), expected, strict=True):
        np.testing.assert_array_equal(now, before)


def test_no_flipped_bit_is_read_as_another_value(tmp_path, monkeypatch):
    """Documents, tokens, offsets, the manifest and the packing index; the script flips more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    bit_flips = importlib.import_module("bit_flips")
    found = bit_flips.count_flips(bit_flips.make_kinds(tmp_path), 12, seed=32)
    assert [counts["refused"] + counts["equal"] for counts in found.values()] == [12] * 5
