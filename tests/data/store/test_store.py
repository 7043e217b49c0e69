"""Reading token stores."""

import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.store import arrays
from maxlm.data.store.build import build_store
from maxlm.data.store.store import TokenStore, check_tokenizer

REBUILD = "build the store again with maxlm corpus build"
# The long run of zeros covers whole chunks and shards with zarr's fill value.
TEXTS = [bytes([97 + i % 26]) * (i * 37 % 101 + 1) for i in range(60)] + [bytes(1500)]
FLAT = np.concatenate([np.array([256, *text, 257], np.uint16) for text in TEXTS])


@pytest.fixture
def store(tmp_path, byte_tokenizer, small_shards, set_part_bytes):
    """Several shards of several chunks, with ragged ends."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text.decode()}) + "\n" for text in TEXTS)
    )
    source = SourceConfig(documents=(str(path),))
    set_part_bytes(300)
    build_store(source, byte_tokenizer(), tmp_path / "store", workers=1)
    return TokenStore.open(tmp_path / "store")


@pytest.mark.heavy
def test_read_any_range(store):
    assert store.num_tokens == len(FLAT)
    assert len(list((store.path / "tokens" / "c").iterdir())) > 5

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(*[st.integers(0, len(FLAT))] * 2), max_size=5))
    def check(pairs):
        ranges = [sorted(pair) for pair in pairs]
        starts, stops = [r[0] for r in ranges], [r[1] for r in ranges]
        many = store.read_many(starts, stops)
        assert len(many) == len(ranges)
        for (start, stop), tokens in zip(ranges, many, strict=True):
            np.testing.assert_array_equal(tokens, FLAT[start:stop])
            np.testing.assert_array_equal(store.read(start, stop), FLAT[start:stop])

    check()
    for start, stop in ((-1, 5), (5, 4), (0, len(FLAT) + 1)):
        with pytest.raises(IndexError, match="does not lie within"):
            store.read_many([0, start], [1, stop])


def test_documents(store):
    for index in (0, 17, len(TEXTS) - 1):
        assert store.document(index).tolist() == [256, *TEXTS[index], 257]
    for index in (-1, len(TEXTS)):
        message = fails(lambda index=index: store.document(index))
        assert message.endswith(
            f"there is no document {index}; the store has 61; choose 0 to 60"
        )


def test_pickles_small_and_reopens(store):
    store.read(0, 9), store.offsets
    data = pickle.dumps(store)
    assert len(data) < 4096
    copy = pickle.loads(data)
    assert copy.manifest == store.manifest
    np.testing.assert_array_equal(copy.read(100, 700), FLAT[100:700])
    np.testing.assert_array_equal(copy.offsets, store.offsets)


def fails(call) -> str:
    with pytest.raises(MaxlmError) as caught:
        call()
    return str(caught.value)


def edit_manifest(store, **changes):
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest.pop("sha256", None)
    path.write_text(json.dumps(manifest))
    return lambda: TokenStore.open(store.path)


def test_damaged_manifests(store):
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"eos_id": 257', '"eos_id": 253'))
    assert fails(lambda: TokenStore.open(store.path)) == (
        f"{path}: damaged manifest (it has changed since it was written); {REBUILD}"
    )
    message = fails(edit_manifest(store, num_documents=3))
    assert (
        "damaged store: offsets are int64 [62], the manifest says int64 [4]; "
        in message
    )
    assert "store format 9; this maxlm reads 1" in fails(
        edit_manifest(store, format_version=9)
    )
    path.write_text("{")
    assert fails(lambda: TokenStore.open(store.path)).startswith(
        f"{path}: damaged manifest ("
    )


@pytest.mark.parametrize("damage", [None, -20, 5])
def test_lost_and_damaged_shards_are_errors_that_name_the_file(store, damage):
    shard = store.path / "tokens" / "c" / "1"
    data = bytearray(shard.read_bytes())
    if damage is None:
        shard.unlink()
    elif damage < 0:
        shard.write_bytes(data[:damage])
    else:
        data[damage] ^= 4
        shard.write_bytes(data)
    message = fails(lambda: TokenStore.open(store.path).read(500, 520))
    assert message.startswith(f"{store.path}/tokens: cannot read tokens 500 to 520: ")
    assert f'"{shard}"' in message


def overwrite(store, name, index, value):
    arrays.open_for_writing(store.path, name)[index].write(value).result()
    return TokenStore.open(store.path).verify


def test_verify_finds_wrong_values(store, monkeypatch):
    monkeypatch.setattr("maxlm.data.store.store.check_files", lambda *_: None)
    assert "token 300 lies outside the vocabulary" in fails(
        overwrite(store, "tokens", 7, 300)
    )
    message = fails(overwrite(store, "tokens", 7, 5))
    assert "the tokens of segment 0 are not those that were written" in message
    overwrite(store, "tokens", 7, int(FLAT[7]))()
    for index, value in ((3, 0), (0, 1)):
        before = int(store.offsets[index])
        assert "offsets do not rise from 0" in fails(
            overwrite(store, "offsets", index, value)
        )
        overwrite(store, "offsets", index, before)
    message = fails(overwrite(store, "offsets", 61, len(FLAT) + 9))
    assert f"offsets end at {len(FLAT) + 9}, not at {len(FLAT)}; {REBUILD}" in message


def test_check_tokenizer(store, byte_tokenizer):
    from maxlm.data.tokenizer import load

    check_tokenizer(store, load.load_tokenizer(store.tokenizer_folder))
    other = load.load_tokenizer(byte_tokenizer(1))
    message = fails(lambda: check_tokenizer(store, other))
    assert f", not {other.fingerprint[:12]}); use the" in message


@pytest.mark.heavy
def test_no_flipped_bit_is_read_as_another_value(tmp_path, monkeypatch):
    """Of tokens, offsets, the manifest and, verified, other files and the packing
    index; the script flips more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    bit_flips = importlib.import_module("bit_flips")
    flips = bit_flips.count_flips(bit_flips.make_kinds(tmp_path), 6, seed=32)
    assert [counts["refused"] + counts["equal"] for counts in flips.values()] == [6] * 5
