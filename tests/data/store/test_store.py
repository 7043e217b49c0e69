"""Reading token stores."""

import json
import pickle
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig
from maxlm.data.store import TokenStore, arrays, build_store, check_tokenizer

REBUILD = "build the store again with maxlm corpus build"
# The long run of zeros covers whole chunks and shards with zarr's fill value.
TEXTS = [bytes([97 + i % 26]) * (i * 37 % 101 + 1) for i in range(60)] + [bytes(1500)]
FLAT = np.concatenate([np.array([256, *text, 257], np.uint16) for text in TEXTS])


@pytest.fixture
def store(tmp_path, byte_tokenizer, monkeypatch):
    """Several shards of several chunks, with ragged ends."""
    monkeypatch.setattr(arrays, "SHARD_TOKENS", 512)
    monkeypatch.setattr("maxlm.data.store.assemble.SHARD_TOKENS", 512)
    monkeypatch.setattr(arrays, "CHUNK_TOKENS", 64)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in TEXTS))
    source = SourceConfig(documents=(str(path),))
    build_store(source, byte_tokenizer(), tmp_path / "store", workers=1, shard_bytes=300)
    return TokenStore.open(tmp_path / "store")


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


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, len(FLAT) + 1)])
def test_ranges_outside_the_store(store, start, stop):
    with pytest.raises(IndexError, match="does not lie within"):
        store.read(start, stop)
    with pytest.raises(IndexError, match="does not lie within"):
        store.read_many([0, start], [1, stop])


def test_documents(store):
    for index in (0, 17, len(TEXTS) - 1):
        assert store.document(index).tolist() == [256, *TEXTS[index], 257]
    for index in (-1, len(TEXTS)):
        with pytest.raises(MaxlmError) as caught:
            store.document(index)
        assert str(caught.value) == (
            f"{store.path}: there is no document {index}; the store has 61; choose 0 to 60"
        )


def test_pickles_small_and_reopens(store):
    store.read(0, 9), store.offsets
    data = pickle.dumps(store)
    assert len(data) < 4096
    copy = pickle.loads(data)
    assert copy.manifest == store.manifest
    np.testing.assert_array_equal(copy.read(100, 700), FLAT[100:700])
    np.testing.assert_array_equal(copy.offsets, store.offsets)


def test_verify_accepts_a_good_store(store):
    store.verify()
    # Windows that begin and end inside documents.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maxlm.data.store.store._VERIFY_TOKENS", 7)
        store.verify()


def fails(call) -> str:
    with pytest.raises(MaxlmError) as caught:
        call()
    return str(caught.value)


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert fails(lambda path=path: TokenStore.open(path)) == (
            f"{path}: there is no token store here; {REBUILD}"
        )


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
    n = store.num_tokens
    assert fails(edit_manifest(store, num_tokens=n - 1)) == (
        f"{store.path}: damaged store: tokens are uint16 [{n}], the manifest says "
        f"uint16 [{n - 1}]; {REBUILD}"
    )
    assert fails(edit_manifest(store, num_tokens=n, num_documents=3)) == (
        f"{store.path}: damaged store: offsets are int64 [62], the manifest says int64 [4]; "
        f"{REBUILD}"
    )
    assert fails(edit_manifest(store, format_version=9)) == (
        f"{path}: store format 9; this maxlm reads 1; {REBUILD}"
    )
    assert fails(edit_manifest(store, format_version=1, dtype="int3")) == (
        f"{path}: damaged manifest (dtype: Input should be 'uint16' or 'uint32'); {REBUILD}"
    )
    path.write_text("{")
    assert fails(lambda: TokenStore.open(store.path)).startswith(f"{path}: damaged manifest (")


@pytest.mark.parametrize("name", ["tokens", "offsets"])
def test_missing_array(store, name):
    shutil.rmtree(store.path / name)
    message = fails(lambda: TokenStore.open(store.path))
    assert message.startswith(f"{store.path}/{name}: array error: NOT_FOUND: ")
    assert message.endswith("; check the disk, or " + REBUILD)


def test_lost_and_damaged_shards_are_errors_not_zeros(store):
    shard = store.path / "tokens" / "c" / "1"
    data = bytearray(shard.read_bytes())
    shard.unlink()
    advice = f"put an undamaged copy of the file there, or {REBUILD}"
    assert fails(lambda: TokenStore.open(store.path).read(500, 520)) == (
        f"{shard}: cannot read chunk 0 (tokens 512 to 575): missing; {advice}"
    )
    shard.write_bytes(data[:-20])
    message = fails(lambda: TokenStore.open(store.path).read(512, 1024))
    assert message.startswith(f"{shard}: cannot read the index of its chunks (tokens 512 to 1,023)")
    assert message.endswith(advice)


def overwrite(store, name, index, value):
    arrays.open_for_writing(store.path, name)[index].write(value).result()
    return TokenStore.open(store.path).verify


def without_checksums(store):
    """As an older version left it."""
    (store.path / "checksums.sha256").unlink()
    edit_segment(store, checksums_sha256=None)


def edit_segment(store, **changes):
    segments = json.loads((store.path / "manifest.json").read_text())["segments"]
    return edit_manifest(store, segments=[segments[0] | changes])


def test_a_lost_or_cut_list_of_checksums_is_damage(store):
    path = store.path / "checksums.sha256"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert fails(store.verify) == f"{path}: this file has changed since it was written; {REBUILD}"
    path.unlink()
    assert fails(store.verify) == f"{path}: this file is missing; {REBUILD}"
    path.mkdir()
    assert fails(store.verify) == f"{path}: cannot read: Is a directory; build the store again"
    path.rmdir()
    edit_segment(store, checksums_sha256=None)().verify()


@pytest.mark.parametrize("name", ["tokens/c/1", "offsets/zarr.json", "tokenizer/double.json"])
def test_verify_names_the_damaged_file(store, name):
    """One flipped bit, a lost file; sha256sum agrees."""
    check = ["sha256sum", "--quiet", "-c", "checksums.sha256"]
    assert subprocess.run(check, cwd=store.path, check=False).returncode == 0
    path = store.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert fails(store.verify) == f"{path}: this file has changed since it was written; {REBUILD}"
    assert subprocess.run(check, cwd=store.path, check=False).returncode == 1
    path.unlink()
    assert fails(store.verify) == f"{path}: this file is missing; {REBUILD}"


def test_every_file_but_the_manifest_has_a_checksum(store):
    lines = (store.path / "checksums.sha256").read_text().splitlines()
    files = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
    assert {line[66:] for line in lines} == files - {"manifest.json", "checksums.sha256"}


def test_verify_finds_wrong_values(store):
    without_checksums(store)
    prefix = f"{store.path}: damaged store: "
    inside, first, last = (
        int(store.offsets[5]) + 1,
        int(store.offsets[5]),
        int(store.offsets[6]) - 1,
    )
    kept = FLAT[[inside, first, last]].tolist()
    assert fails(overwrite(store, "tokens", inside, 300)) == (
        f"{prefix}token 300 lies outside the vocabulary; {REBUILD}"
    )
    overwrite(store, "tokens", inside, kept[0])
    assert fails(overwrite(store, "tokens", first, 5)) == (
        f"{prefix}a document does not begin with bos; {REBUILD}"
    )
    overwrite(store, "tokens", first, kept[1])
    assert fails(overwrite(store, "tokens", last, 5)) == (
        f"{prefix}a document does not end with eos; {REBUILD}"
    )
    overwrite(store, "tokens", last, kept[2])()
    edit_manifest(store, segments=[])
    assert fails(overwrite(store, "offsets", 3, 0)) == (
        f"{prefix}offsets do not rise by at least two (bos and eos); {REBUILD}"
    )
    assert fails(overwrite(store, "offsets", 0, 1)) == (
        f"{prefix}offsets run from 1 to {len(FLAT)}, not from 0 to {len(FLAT)}; {REBUILD}"
    )


def test_check_tokenizer(store, byte_tokenizer):
    from maxlm.data import tokenizer

    check_tokenizer(store, tokenizer.load_tokenizer(store.tokenizer_folder))
    other = tokenizer.load_tokenizer(byte_tokenizer(1))
    mine = store.manifest.tokenizer_fingerprint
    assert fails(lambda: check_tokenizer(store, other)) == (
        f"{store.path}: the store was made with another tokenizer ({mine[:12]}, not "
        f"{other.fingerprint[:12]}); use the tokenizer in {store.path}/tokenizer, or build the "
        "store again with yours"
    )
