"""A bit that flips on the disk is an error that names the file, and is never read as a token."""

import collections
import json
import re
import shutil

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.corpus import SourceConfig
from maxlm.data.loader import LoaderConfig, make_loader
from maxlm.data.store import TokenStore, append_store, arrays, build_store


@pytest.fixture
def store(tmp_path, byte_tokenizer, monkeypatch):
    """Two segments of several shards of several chunks, with ragged ends."""
    monkeypatch.setattr(arrays, "SHARD_TOKENS", 512)
    monkeypatch.setattr("maxlm.data.store.assemble.SHARD_TOKENS", 512)
    monkeypatch.setattr(arrays, "CHUNK_TOKENS", 64)
    for part in "ab":
        texts = [f"{part} {i} " + "xyz" * (i % 23) for i in range(90)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    sources = [SourceConfig(documents=(str(tmp_path / f"{part}.jsonl"),)) for part in "ab"]
    build_store(sources[0], byte_tokenizer(), tmp_path / "store", workers=1)
    append_store(sources[1], tmp_path / "store", workers=1)
    return TokenStore.open(tmp_path / "store")


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
        ("tokens/c/1", 70, "chunk 0 (tokens 512 to 575)"),
        ("tokens/c/6", -3, "the index of its chunks (tokens 3,072 to 3,526)"),
        ("segments/000001/tokens/c/2", 70, "chunk 0 (tokens 4,551 to 4,614)"),
        ("segments/000001/offsets/c/0", 70, "chunk 0 (offsets 90 to 153)"),
    ],
)
def test_the_file_the_chunk_and_what_is_lost_are_named(store, file, at, lost):
    flip(store.path / file, at)
    with pytest.raises(MaxlmError) as caught:
        read_all(store)
    path = re.escape(f"{store.path / file}: cannot read {lost}: ")
    advice = "put an undamaged copy of the file there, or build the store again"
    assert re.fullmatch(f"{path}.+; {advice} .*", str(caught.value))


def test_a_worker_that_meets_a_damaged_chunk_ends_the_loader_with_its_line(store):
    """It is met after the steps that threads of this process make; those before are good."""
    flip(store.path / "segments/000001/tokens/c/5", 70)
    config = LoaderConfig(seq_len=64, batch_size=8, shuffle=False, workers=1, prefetch=1)
    with make_loader({"a": store}, {"a": 1}, config, seed=0, start_step=0) as loader:
        lost = r"/000001/tokens/c/5: cannot read chunk 1 \(tokens 6,151 "
        with pytest.raises(MaxlmError, match=lost):
            collections.deque(loader, maxlen=0)
        assert loader.step == 6151 // 512


def test_stores_without_checksums_read_as_before(store):
    """Of two segments the first has chunks as older versions wrote them."""
    expected = read_all(store)
    for name, values in (("offsets", expected[0][:91]), ("tokens", expected[1][:3527])):
        path = store.path / name / "zarr.json"
        metadata = json.loads(path.read_text())
        assert metadata["codecs"][0]["configuration"]["codecs"].pop() == {"name": "crc32c"}
        shutil.rmtree(path.with_name("c"))
        path.write_text(json.dumps(metadata))
        arrays.write_array(arrays.open_for_writing(store.path, name), 0, values, store.path)
    for now, before in zip(read_all(store), expected, strict=True):
        np.testing.assert_array_equal(now, before)
    flip(store.path / "tokens/c/1", 70)
    assert not np.array_equal(read_all(store)[1], expected[1]), "these chunks have checksums"
