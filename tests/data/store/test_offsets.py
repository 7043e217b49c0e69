"""Offsets read in blocks answer as an array of them would, in few reads and little memory."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.documents import SourceConfig
from maxlm.data.loader import LoaderConfig, Mixing, make_batches
from maxlm.data.store import TokenStore, build_store, offsets
from maxlm.data.store import store as store_module
from maxlm.data.store.offsets import BLOCK, Offsets


def offsets_of(array):
    return Offsets(lambda ranges: [array[a:b] for a, b in ranges], array.size)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 99),
    size=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 5]),
    sigma=st.sampled_from([0.0, 1.0, 6.0]),  # 6: most tokens are in a few documents.
    side=st.sampled_from(["left", "right"]),
)
def test_as_an_array(seed, size, sigma, side):
    random = np.random.default_rng(seed)
    lengths = random.lognormal(2, sigma, size - 1).astype(np.int64) + 1
    array = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    made = offsets_of(array)
    values = np.concatenate(
        [random.integers(0, array[-1] + 1, 40), random.choice(array, 40), [0, array[-1]]]
    )
    assert made.size == len(made) == array.size
    assert np.array_equal(made.searchsorted(values, side=side), array.searchsorted(values, side))
    some = random.integers(0, size, 30)
    assert np.array_equal(made[some], array[some])
    low, high = np.sort(random.integers(0, size + 1, 2))
    assert np.array_equal(made[low:high], array[low:high])


def test_a_store_of_many_documents_reads_blocks(tmp_path, byte_tokenizer, monkeypatch):
    """The same batches as with all offsets in memory, and the same verdict of verify."""
    texts = [f"{i} " + "x" * (i % 7) for i in range(3 * BLOCK)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    source = SourceConfig(documents=(str(tmp_path / "a.jsonl"),))
    build_store(source, byte_tokenizer(), tmp_path / "store", workers=1)
    whole = TokenStore.open(tmp_path / "store")
    assert isinstance(whole.offsets, np.ndarray)
    monkeypatch.setattr(store_module, "IN_MEMORY_DOCUMENTS", 10)
    monkeypatch.setattr(offsets, "_KEPT_BLOCKS", 2)
    blocks = TokenStore.open(tmp_path / "store")
    assert isinstance(blocks.offsets, Offsets)
    for packing in ("concat", "best_fit"):
        config = LoaderConfig(seq_len=64, batch_size=16, packing=packing)
        first, second = (
            make_batches({"a": store}, {"a": 1}, config, seed=0) for store in (whole, blocks)
        )
        for step in (0, 5, 10**9):
            a, b = first.rows(step), second.rows(step)
            assert all(np.array_equal(a[name], b[name]) for name in a)
    blocks.verify()


class SimulatedStore:
    """Documents of 500 to 1,500 tokens whose offsets are computed, so that there may be 10^10."""

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

    def _read(self, ranges):
        self.reads += len(ranges)
        return [self.starts(np.arange(a, b)) for a, b in ranges]

    def read_many(self, starts, stops):
        return [np.arange(a, b) % 50000 for a, b in zip(starts, stops, strict=True)]


def test_a_mixture_of_ten_trillion_tokens_resumes_at_once():
    """At any step the first batch costs some reads a row, and memory stays small."""
    sizes = {"web": 7 * 10**9, "code": 2 * 10**9, "books": 10**9}
    stores = {name: SimulatedStore(size) for name, size in sizes.items()}
    assert sum(store.num_tokens for store in stores.values()) > 9.99e12
    mixing = Mixing({"web": 5, "code": 3, "books": 2}, max_epochs={"books": 2})
    config = LoaderConfig(seq_len=2048, batch_size=64)
    made = make_batches(stores, mixing, config, seed=0)
    assert sum(store.reads for store in stores.values()) == 0
    rows = 0
    for step in (10**8, 0, 10**12, 76_543_210):
        batch = made.rows(step)
        rows += 64
        assert batch["segment_ids"].all()
        ends = (batch["weights"] == 0) & (batch["segment_ids"] > 0)
        assert 64 < ends.sum() < 64 * 5
    # A row's two ends lie in one block or in neighbours; a search reads a block for each halving.
    assert sum(store.reads for store in stores.values()) < 24 * rows
    for store in stores.values():
        assert sum(block.nbytes for block in store.offsets._kept.values()) <= 32 << 20
