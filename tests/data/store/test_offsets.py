"""Offsets read as they are needed answer as an array of them would, in few reads."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.documents.config import SourceConfig
from maxlm.data.loader.batches import LoaderConfig, make_batches
from maxlm.data.loader.mixture import Mixing
from maxlm.data.store import store as store_module
from maxlm.data.store.arrays import CHUNK_OFFSETS, Offsets
from maxlm.data.store.build import build_store
from maxlm.data.store.store import TokenStore


def offsets_of(array):
    return Offsets(lambda key: array[key], array.size)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 99),
    size=st.sampled_from([1, 2, 4095, 4096, 9 * 4096 + 5]),
    sigma=st.sampled_from([0.0, 1.0, 6.0]),  # 6: most tokens are in a few documents.
)
def test_as_an_array(seed, size, sigma):
    random = np.random.default_rng(seed)
    lengths = random.lognormal(2, sigma, size - 1).astype(np.int64) + 1
    array = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    offsets = offsets_of(array)
    values = np.concatenate(
        [
            random.integers(0, array[-1] + 1, 40),
            random.choice(array, 40),
            [0, array[-1]],
        ]
    )
    assert offsets.size == array.size
    assert np.array_equal(
        offsets.searchsorted(values, "right"), array.searchsorted(values, "right")
    )
    some = random.integers(0, size, 30)
    assert np.array_equal(offsets[some], array[some])
    low, high = np.sort(random.integers(0, size + 1, 2))
    assert np.array_equal(offsets[low:high], array[low:high])
    assert np.array_equal(offsets[low : high + size], array[low:])


def test_a_store_of_many_documents_reads_chunks(tmp_path, byte_tokenizer, monkeypatch):
    """The same batches as with all offsets in memory, and the same verdict of
    verify."""
    texts = [f"{i} " + "x" * (i % 7) for i in range(3 * CHUNK_OFFSETS)]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{text}"}}\n' for text in texts)
    )
    source = SourceConfig(documents=(str(tmp_path / "a.jsonl"),))
    build_store(source, byte_tokenizer(), tmp_path / "store", workers=1)
    whole = TokenStore.open(tmp_path / "store")
    assert isinstance(whole.offsets, np.ndarray)
    monkeypatch.setattr(store_module, "IN_MEMORY_DOCUMENTS", 10)
    monkeypatch.setattr(store_module, "_MANY_OFFSETS_CACHE_BYTES", 1 << 16)
    chunks = TokenStore.open(tmp_path / "store")
    assert isinstance(chunks.offsets, Offsets)
    for packing in ("concat", "best_fit"):
        config = LoaderConfig(seq_len=64, batch_size=16, packing=packing)
        first, second = (
            make_batches({"a": store}, {"a": 1}, config, seed=0)
            for store in (whole, chunks)
        )
        for step in (0, 5, 10**9):
            a = first.rows(step)
            b = second.rows(step)
            assert all(np.array_equal(a[name], b[name]) for name in a)
    chunks.verify()


class SimulatedStore:
    """Documents of 500 to 1,500 tokens whose offsets are computed, so that there may be
    10^10."""

    path, offsets_sha256 = None, ""

    def __init__(self, num_documents):
        self.num_documents = num_documents
        self.reads = 0
        self.offsets = Offsets(self._read, num_documents + 1)

    @property
    def num_tokens(self):
        return int(self.starts(np.array([self.num_documents]))[0])

    def starts(self, index):
        return 1000 * index + (index * 2654435761 % 500) * (index > 0)

    def _read(self, key):
        self.reads += 1
        return self.starts(key)

    def read_many(self, starts, stops):
        return [np.arange(a, b) % 50000 for a, b in zip(starts, stops, strict=True)]


def test_a_mixture_of_ten_trillion_tokens_resumes_at_once():
    """At any step a batch costs as many reads of a store as a bisection has steps."""
    sizes = {"web": 7 * 10**9, "code": 2 * 10**9, "books": 10**9}
    stores = {name: SimulatedStore(size) for name, size in sizes.items()}
    assert sum(store.num_tokens for store in stores.values()) > 9.99e12
    mixing = Mixing({"web": 5, "code": 3, "books": 2}, max_epochs={"books": 2})
    config = LoaderConfig(seq_len=2048, batch_size=64)
    batches = make_batches(stores, mixing, config, seed=0)
    assert sum(store.reads for store in stores.values()) == 0
    for step in (10**8, 0, 10**12, 76_543_210):
        batch = batches.rows(step)
        assert batch["segment_ids"].all()
        ends = (batch["weights"] == 0) & (batch["segment_ids"] > 0)
        assert 64 < ends.sum() < 64 * 5
    assert all(store.reads <= 4 * (34 + 2) for store in stores.values())
