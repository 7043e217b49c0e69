"""Appending to a store: new documents after the old, which nobody touches."""

import json

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.loader.batches import LoaderConfig, make_batches
from maxlm.data.store.build import append_store, build_store
from maxlm.data.store.store import TokenStore


def all_documents(sources):
    return SourceConfig(
        documents=tuple(name for source in sources for name in source.documents)
    )


def batches(store, packing):
    config = LoaderConfig(seq_len=32, batch_size=4, packing=packing)
    batches = make_batches({"a": store}, {"a": 1}, config, seed=0)
    return [batches.rows(step) for step in (0, 1, 2, 7, 10**6)]


def assert_same_batches(first, second):
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_reads_and_batches_as_if_built_at_once(
    tmp_path, sources, byte_tokenizer, appended, packing
):
    store = TokenStore.open(appended)
    build_store(all_documents(sources), byte_tokenizer(), tmp_path / "whole", workers=1)
    whole = TokenStore.open(tmp_path / "whole")
    assert store.manifest == whole.manifest.model_copy(
        update={"segments": store.manifest.segments}
    )
    assert len(store.manifest.segments) == 3
    assert np.array_equal(store.offsets, whole.offsets)
    assert np.array_equal(
        store.read(0, store.num_tokens), whole.read(0, whole.num_tokens)
    )
    for index in (0, 39, 40, 41, 79, 80, 119):
        assert np.array_equal(store.document(index), whole.document(index))
    edge = int(store.offsets[40])
    starts, stops = [edge - 9, edge, 0], [edge + 9, edge + 1, store.num_tokens]
    for a, b in zip(
        store.read_many(starts, stops), whole.read_many(starts, stops), strict=True
    ):
        assert np.array_equal(a, b)
    assert_same_batches(batches(store, packing), batches(whole, packing))
    store.verify()


def test_readers_of_before_go_on(tmp_path, sources, byte_tokenizer, folder_bytes):
    out = tmp_path / "store"
    build_store(sources[0], byte_tokenizer(), out, workers=1)
    old = TokenStore.open(out)
    before = batches(old, "best_fit")
    files = folder_bytes(out)
    manifest = append_store(sources[1], out, workers=1)
    assert_same_batches(batches(old, "best_fit"), before)
    pinned = TokenStore.open(out, segments=1)
    assert pinned.manifest == old.manifest
    assert_same_batches(batches(pinned, "best_fit"), before)
    now = folder_bytes(out)
    assert {name for name in files if now[name] != files[name]} == {"manifest.json"}
    assert TokenStore.open(out).manifest == manifest
    # Another number of documents has another index.
    TokenStore.open(out).verify()
    batches(TokenStore.open(out), "best_fit")
    assert len(list((out / "packing").iterdir())) == 2
    with pytest.raises(
        MaxlmError, match="segments: the store has 2 segments, not 3; ask for 1"
    ):
        TokenStore.open(out, segments=3)


def test_appending_again_does_nothing_and_doubles_are_refused(
    tmp_path, sources, appended, folder_bytes
):
    before = folder_bytes(appended)
    (tmp_path / "b.jsonl").rename(tmp_path / "copy.jsonl")
    moved = SourceConfig(documents=(str(tmp_path / "copy.jsonl"),))
    for source in (moved, sources[2], sources[0]):
        append_store(source, appended, workers=1)
    assert folder_bytes(appended) == before
    (tmp_path / "copy.jsonl").rename(tmp_path / "b.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "new"}\n')
    both = SourceConfig(documents=(str(tmp_path / "d.jsonl"), *sources[1].documents))

    def refused(source):
        with pytest.raises(MaxlmError) as error:
            append_store(source, appended, workers=1)
        assert folder_bytes(appended) == before
        return str(error.value)

    assert refused(both).endswith(
        f"{sources[1].documents[0]} is already in the store; leave it out"
    )
    other = SourceConfig(documents=both.documents[:1], on_bad_bytes="replace")
    assert "cannot append: on_bad_bytes was error, now replace; give" in refused(other)


def test_earlier_segments_have_earlier_rules(appended):
    """`selection` is of the segments that are read."""
    path = appended / "manifest.json"
    manifest = json.loads(path.read_text()) | {"selection": "x"}
    manifest["segments"][1]["selection"] = "x"
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    selections = [
        TokenStore.open(appended, segments=n).manifest.selection for n in (1, 2, 3)
    ]
    assert selections == [None, "x", "x"]


def test_no_store_to_append_to(tmp_path, sources):
    with pytest.raises(MaxlmError, match="there is no token store here"):
        append_store(sources[0], tmp_path / "none", workers=1)
    with pytest.raises(
        MaxlmError, match="s3://bucket/store is not on a disk; only a token store"
    ):
        append_store(sources[0], "s3://bucket/store", workers=1)
