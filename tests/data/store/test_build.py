"""Building token stores: what they contain, and that only the inputs decide it."""

import gzip
import hashlib
import json
import re
import resource

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import is_heldout
from maxlm.data.store import build as build_module
from maxlm.data.store import parts as parts_module
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.build import build_store
from maxlm.data.store.store import TokenStore

TEXTS = [f"document {i} " + "xyz" * (i % 7) for i in range(50)]


@pytest.fixture
def corpus(tmp_path):
    """Text, JSONL and compressed JSONL: TEXTS in order, plus an empty file and an empty
    row."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"a{i}.txt").write_text(TEXTS[i])
    (folder / "a99.txt").write_text("")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "b.jsonl").write_text("".join(lines[10:40]) + '{"text": ""}\n')
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[40:]).encode()))
    return SourceConfig(documents=(str(folder),))


def expected_tokens(texts, bos=256, eos=257):
    return [[bos, *text.encode(), eos] for text in texts]


def documents(path):
    store = TokenStore.open(path)
    return [store.document(i).tolist() for i in range(store.num_documents)]


def test_contents_and_manifest(tmp_path, corpus, byte_tokenizer):
    out = tmp_path / "deep" / "store"
    manifest = build_store(corpus, byte_tokenizer(), out, workers=1)
    assert documents(out) == expected_tokens(TEXTS)
    store = TokenStore.open(out)
    assert store.manifest == manifest
    flat = np.concatenate([np.array(tokens) for tokens in expected_tokens(TEXTS)])
    np.testing.assert_array_equal(store.read(0, store.num_tokens), flat)
    lengths = [len(tokens) for tokens in expected_tokens(TEXTS)]
    np.testing.assert_array_equal(store.offsets, np.cumsum([0, *lengths]))
    assert store.offsets.dtype == np.int64
    assert (manifest.num_documents, manifest.num_tokens) == (50, len(flat))
    assert manifest.text_bytes == sum(map(len, TEXTS))
    assert (manifest.vocab_size, manifest.bos_id, manifest.eos_id) == (300, 256, 257)
    by_name = {source.name.split("/")[-1]: source for source in manifest.sources}
    assert len(by_name) == 13
    assert (by_name["b.jsonl"].num_documents, by_name["b.jsonl"].num_left_out) == (
        30,
        1,
    )
    assert (by_name["a99.txt"].num_documents, by_name["a99.txt"].num_left_out) == (0, 1)
    data = (tmp_path / "corpus" / "c.jsonl.gz").read_bytes()
    assert by_name["c.jsonl.gz"].sha256 == hashlib.sha256(data).hexdigest()
    assert by_name["c.jsonl.gz"].size == len(data)
    assert [path.name for path in out.parent.iterdir()] == ["store"]


def test_splits_part_the_corpus(tmp_path, corpus, byte_tokenizer):
    for split in ("train", "heldout"):
        manifest = build_store(
            corpus,
            byte_tokenizer(),
            tmp_path / split,
            split=split,
            heldout_fraction=0.3,
            workers=1,
        )
        texts = [
            text for text in TEXTS if is_heldout(text, 0.3) == (split == "heldout")
        ]
        assert 5 < len(texts) < 45
        assert documents(tmp_path / split) == expected_tokens(texts)
        assert manifest.text_bytes == sum(map(len, texts))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")]
)
def test_width_follows_the_vocabulary(
    tmp_path, corpus, byte_tokenizer, vocab_size, dtype
):
    assert token_dtype(vocab_size) == dtype
    shift = vocab_size - 258
    build_store(
        corpus, byte_tokenizer(shift, vocab_size), tmp_path / "store", workers=1
    )
    store = TokenStore.open(tmp_path / "store")
    assert store.manifest.dtype == store.read(0, 5).dtype == dtype
    assert store.read(0, 1)[0] == 256 + shift


def test_part_size_does_not_change_the_store(
    tmp_path, corpus, byte_tokenizer, folder_bytes, set_part_bytes
):
    stores = []
    for part_bytes in (1, 100, 1 << 20):
        set_part_bytes(part_bytes)
        out = tmp_path / f"store-{part_bytes}"
        build_store(corpus, byte_tokenizer(), out, workers=1)
        stores.append(folder_bytes(out))
    assert stores[0] == stores[1] == stores[2]


def test_rebuild_with_equal_inputs_does_nothing(
    tmp_path, corpus, byte_tokenizer, monkeypatch
):
    out = tmp_path / "store"
    first = build_store(corpus, byte_tokenizer(), out, workers=1)

    def never(*args):
        raise AssertionError("work was done")

    monkeypatch.setattr(build_module, "tokenize_part", never)
    monkeypatch.setattr(build_module, "create_array", never)
    assert build_store(corpus, byte_tokenizer(), out, workers=1) == first
    assert build_store(corpus, byte_tokenizer(), out, workers=1, force=True) == first
    # The same files under another name are the same inputs.
    (tmp_path / "corpus").rename(tmp_path / "moved")
    moved = SourceConfig(documents=(str(tmp_path / "moved"),))
    assert build_store(moved, byte_tokenizer(), out, workers=1) == first


def test_other_inputs_need_force(tmp_path, corpus, byte_tokenizer, folder_bytes):
    out = tmp_path / "store"
    folder = tmp_path / "corpus"
    build_store(corpus, byte_tokenizer(), out, workers=1)
    before = folder_bytes(out)

    def refused(source=corpus, tokenizer=None, split="all", heldout_fraction=0.0):
        """What is said to differ."""
        with pytest.raises(MaxlmError) as caught:
            build_store(
                source,
                tokenizer or byte_tokenizer(),
                out,
                split=split,
                heldout_fraction=heldout_fraction,
                workers=1,
            )
        assert folder_bytes(out) == before
        prefix = f"{out}: the store here was built from other inputs: "
        text = str(caught.value).removeprefix(prefix)
        difference, _, _ = text.partition("; choose another folder, or ")
        return difference

    old, new = (hashlib.sha256(f"{s} 300".encode()).hexdigest()[:12] for s in (0, 1))
    difference = f"another tokenizer ({old}, now {new})"
    assert refused(tokenizer=byte_tokenizer(1)) == difference
    assert refused(split="train", heldout_fraction=0.1) == "split was all, now train"
    other_policy = corpus.model_copy(update={"on_bad_bytes": "replace"})
    assert refused(other_policy) == "on_bad_bytes was error, now replace"
    (folder / "z.txt").write_text("new")
    assert refused() == "13 files, now 14"
    (folder / "a3.txt").write_text("changed")
    assert refused() == f"{folder}/a3.txt has changed"
    (folder / "a0.txt").unlink()
    assert refused() == f"{folder}/a0.txt where now {folder}/a1.txt comes"

    build_store(corpus, byte_tokenizer(), out, workers=1, force=True)
    changed = [*TEXTS[1:3], "changed", *TEXTS[4:], "new"]
    assert documents(out) == expected_tokens(changed)


def test_what_is_no_store_is_never_replaced(tmp_path, corpus, byte_tokenizer):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("precious")
    for force in (False, True):
        with pytest.raises(
            MaxlmError, match=f"{out}: this exists and is not a token store"
        ):
            build_store(corpus, byte_tokenizer(), out, workers=1, force=force)
    assert (out / "chapter1.tex").read_text() == "precious"
    (out / "manifest.json").write_text("{")
    with pytest.raises(MaxlmError, match="damaged manifest"):
        build_store(corpus, byte_tokenizer(), out, workers=1)
    build_store(corpus, byte_tokenizer(), out, workers=1, force=True)
    assert documents(out) == expected_tokens(TEXTS)


def fails(tmp_path, source, tokenizer, **settings) -> str:
    with pytest.raises(MaxlmError) as caught:
        build_store(source, tokenizer, tmp_path / "store", **{"workers": 1} | settings)
    assert not (tmp_path / "store").exists()
    return str(caught.value)


def test_empty_corpus(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("")
    source = SourceConfig(documents=(str(tmp_path / "a.txt"),))
    message = fails(tmp_path, source, byte_tokenizer())
    assert message.startswith(
        f"{tmp_path}/a.txt: the corpus is empty: no text in 1 files; "
    )
    (tmp_path / "a.txt").write_text("text")
    settings = {"split": "heldout", "heldout_fraction": 1e-9}
    message = fails(tmp_path, source, byte_tokenizer(), **settings)
    assert (
        'no document falls into the split "heldout" at heldout_fraction=1e-09; '
        in message
    )
    assert not list(tmp_path.glob(".*"))


def test_bad_settings(tmp_path, corpus, byte_tokenizer):
    message = fails(tmp_path, corpus, byte_tokenizer(), split="train")
    assert message.startswith(
        "heldout_fraction=0.0 does not lie between 0 and 1; give a fraction"
    )


def test_full_disk(tmp_path, byte_tokenizer):
    """A file size limit stands in for a full disk: the writes fail midway."""
    (tmp_path / "a.txt").write_text("x" * 100_000)
    source = SourceConfig(documents=(str(tmp_path / "a.txt"),))
    tokenizer = byte_tokenizer()
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        message = fails(tmp_path, source, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert re.match(
        rf"{tmp_path}/.store.building/parts-\w+: cannot write: File too la", message
    )


def test_a_file_that_changes_meanwhile(tmp_path, corpus, byte_tokenizer, monkeypatch):
    real = parts_module.scan_file

    def scan_then_change(file, slice_bytes):
        scan = real(file, slice_bytes)
        if file.path.name == "a5.txt":
            file.path.write_text("something else entirely")
        return scan

    monkeypatch.setattr(parts_module, "scan_file", scan_then_change)
    message = fails(tmp_path, corpus, byte_tokenizer())
    assert message.startswith(
        f"{tmp_path}/corpus/a5.txt: the file changed while the store was being"
    )
