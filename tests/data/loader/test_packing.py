"""Both packings lay every token into one sequence, once, in pieces of single
documents."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.loader import packing as packing_module
from maxlm.data.loader.packing import ConcatPacking, open_best_fit, pack_best_fit
from tests.data.loader.memory import MemoryStore

documents = st.lists(st.integers(1, 40), min_size=1, max_size=60)
methods = st.sampled_from(["concat", "best_fit"])


def open_packing(store, method, seq_len, block):
    if method == "concat":
        return ConcatPacking(store, seq_len)
    return open_best_fit(store, seq_len, block)


@given(
    lengths=documents,
    seq_len=st.integers(1, 17),
    block=st.integers(1, 70),
    method=methods,
)
def test_every_token_once_in_pieces_of_documents(lengths, seq_len, block, method):
    store = MemoryStore(lengths)
    packing = open_packing(store, method, seq_len, block)
    counts, pieces = packing.find_pieces(np.arange(packing.num_sequences))
    starts, sizes = pieces["start"], pieces["length"]
    assert counts.sum() == pieces.size
    assert (counts > 0).all()
    assert (sizes > 0).all()
    covered = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    assert np.array_equal(np.sort(np.concatenate(covered)), np.arange(store.num_tokens))

    row = np.repeat(np.arange(packing.num_sequences), counts)
    assert (np.bincount(row, sizes) <= seq_len).all()
    document = np.repeat(np.arange(len(lengths)), lengths)
    stops = starts + sizes
    assert np.array_equal(document[starts], document[stops - 1])
    assert np.array_equal(
        pieces["ends_document"], stops == store.offsets[document[starts] + 1]
    )


@given(lengths=documents, seq_len=st.integers(1, 17), method=methods, data=st.data())
def test_any_sequences_alone_and_in_any_order(lengths, seq_len, method, data):
    packing = open_packing(MemoryStore(lengths), method, seq_len, 7)
    number = st.integers(0, packing.num_sequences - 1)
    some = data.draw(st.lists(number, min_size=1, max_size=9))
    together = packing.find_pieces(np.array(some))
    alone = [packing.find_pieces(np.array([i])) for i in some]
    for field, values in enumerate(together):
        assert np.array_equal(values, np.concatenate([one[field] for one in alone]))


@given(items=st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_bins_are_those_of_textbook_best_fit_decreasing(items):
    rooms = []
    for item in sorted(items, reverse=True):
        fitting = [room for room in rooms if room >= item]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 30) - item)
    bins = pack_best_fit(np.array(items), 30)
    assert sorted(30 - np.bincount(bins, items)) == sorted(rooms)


def standard_library_lengths(count, seed=0):
    """Like the bytes of the standard library's files over four, in tokens:
    log-normal."""
    return np.random.default_rng(seed).lognormal(7.5, 1.5, count).astype(np.int64) + 2


@pytest.mark.parametrize("seq_len", [512, 2048])
def test_best_fit_utilisation(seq_len):
    store = MemoryStore(standard_library_lengths(4000))
    packing = open_best_fit(store, seq_len, 4000)
    assert store.num_tokens >= 0.99 * packing.num_sequences * seq_len


def test_index_lies_beside_the_store_and_is_built_once(tmp_path, monkeypatch):
    store = MemoryStore([5, 9, 30, 2, 2], tmp_path)
    built = open_best_fit(store, 10, 4)
    (folder,) = (tmp_path / "packing").iterdir()
    assert folder.name.startswith("best_fit-10-4-")
    in_memory = open_best_fit(MemoryStore([5, 9, 30, 2, 2]), 10, 4)
    monkeypatch.setattr(packing_module, "_write", None)
    for packing in (built, open_best_fit(store, 10, 4)):
        for a, b in zip(packing.index, in_memory.index, strict=True):
            assert np.array_equal(a, b)


def test_many_builders_at_once_agree(tmp_path):
    store = MemoryStore(standard_library_lengths(500), tmp_path)
    with ThreadPoolExecutor(6) as pool:
        indices = list(pool.map(lambda _: open_best_fit(store, 64, 50).index, range(6)))
    assert len(list((tmp_path / "packing").iterdir())) == 1
    for index in indices:
        assert np.array_equal(index.sequence_offsets, indices[0].sequence_offsets)
        assert index.pieces["length"].sum() == store.num_tokens


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing_module.np, "save", full)
    with pytest.raises(
        MaxlmError, match=r"cannot write the packing index .No space left"
    ):
        open_best_fit(MemoryStore([7] * 500, tmp_path), 32, 100)
    assert not list((tmp_path / "packing").iterdir())


def test_a_damaged_index_is_named(tmp_path):
    store = MemoryStore([7] * 500, tmp_path)
    open_best_fit(store, 32, 100)
    (folder,) = (tmp_path / "packing").iterdir()
    (folder / "pieces.npy").write_bytes((folder / "pieces.npy").read_bytes()[:-9])
    with pytest.raises(MaxlmError, match=r"damaged packing index.*; delete this"):
        _ = open_best_fit(store, 32, 100).index
