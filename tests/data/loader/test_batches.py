"""The batch at step s is a function of (stores, mixture, seed, s), and holds what it
should."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.data.loader.batches import load_batches, make_batches, make_one_pass_batches
from tests.data.loader.memory import MemoryStore, assert_equal, config
from tests.errors import message

documents = st.lists(st.integers(2, 40), min_size=4, max_size=30).filter(
    lambda x: sum(x) >= 16
)
methods = st.sampled_from(["concat", "best_fit"])


def rows_by_hand(batch, store):
    """Checks every place of a batch against the documents, one at a time."""
    seen = []
    starts = set(store.offsets.tolist())
    for row in range(batch["tokens"].shape[0]):
        segment = 0
        position = -1
        for column in range(batch["tokens"].shape[1]):
            token, target, here, place, weight = (
                batch[name][row, column].item()
                for name in ("tokens", "targets", "segment_ids", "positions", "weights")
            )
            if here == 0:
                assert (token, target, place, weight) == (0, 0, 0, 0)
                assert not batch["segment_ids"][row, column:].any()
                break
            begins = here != segment
            assert here == segment + begins
            assert place == (0 if begins else position + 1)
            # Token i of the store is i; a new document starts a new segment.
            assert begins or token == seen[-1] + 1
            assert begins or token not in starts
            ends = token + 1 in starts
            assert (target, weight) == ((0, 0.0) if ends else (token + 1, 1.0))
            segment, position = here, place
            seen.append(token)
    return seen


@given(
    lengths=documents, method=methods, seed=st.integers(0, 99), epoch=st.integers(0, 3)
)
def test_an_epoch_holds_every_token_once(lengths, method, seed, epoch):
    store = MemoryStore(lengths)
    batches = make_batches(
        {"a": store}, {"a": 1}, config(batch_size=1, packing=method), seed=seed
    )
    size = batches.sources[0].num_sequences
    seen = [
        token
        for step in range(epoch * size, (epoch + 1) * size)
        for token in rows_by_hand(batches.rows(step), store)
    ]
    assert sorted(seen) == list(range(store.num_tokens))


@given(
    lengths=documents,
    method=methods,
    seed=st.integers(0, 99),
    step=st.integers(0, 10**12),
)
def test_any_rows_of_a_batch_also_by_a_pickled_copy(lengths, method, seed, step):
    stores = {"a": MemoryStore(lengths), "b": MemoryStore([n + 3 for n in lengths])}
    batches = make_batches(stores, {"a": 2, "b": 1}, config(packing=method), seed=seed)
    whole = batches.rows(step)
    assert whole["tokens"].shape == (8, 16)
    copy = pickle.loads(pickle.dumps(batches))
    for rows in ([0, 1, 2, 3], [4, 5], [7, 0, 3], [6]):
        assert_equal({name: whole[name][rows] for name in whole}, copy.rows(step, rows))


def test_epochs_and_seeds_differ():
    store = MemoryStore([1600])
    first, other = (
        make_batches({"a": store}, {"a": 1}, config(batch_size=100), seed=s)
        for s in (0, 1)
    )
    orders = [
        tuple(b.rows(step)["tokens"][:, 0]) for b in (first, other) for step in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_another_store_does_not_change_a_store_s_order():
    a, b = MemoryStore([800]), MemoryStore([900])
    alone = make_batches({"a": a}, {"a": 1}, config(), seed=4)
    both = make_batches({"b": b, "a": a}, {"a": 3, "b": 1}, config(), seed=4)
    _, order_alone = alone.locate(np.arange(64))
    stores, streams = both.mixture.locate(np.arange(512))
    _, order_both = both.locate(np.arange(512))
    first = np.argsort(streams[stores == 1])[:64]
    assert np.array_equal(order_both[stores == 1][first], order_alone)


def test_without_shuffle_reads_in_store_order():
    store = MemoryStore([5, 60, 20])
    batches = make_batches(
        {"a": store}, {"a": 1}, config(batch_size=6, shuffle=False), seed=0
    )
    assert rows_by_hand(batches.rows(0), store) == list(range(85))
    assert_equal(batches.rows(0), batches.rows(1))


@given(lengths=documents, size=st.integers(1, 5))
def test_one_pass_reads_every_token_once_in_constant_shapes(lengths, size):
    store = MemoryStore(lengths)
    batches = make_one_pass_batches(store, 16, size)
    steps = [batches.rows(step) for step in range(batches.num_steps)]
    assert {batch["tokens"].shape for batch in steps} == {(size, 16)}
    seen = [token for batch in steps for token in rows_by_hand(batch, store)]
    assert sorted(seen) == list(range(store.num_tokens))
    assert sum(batch["weights"].sum() for batch in steps) == store.num_tokens - len(
        lengths
    )


def test_one_pass_takes_a_short_store_and_stops_early():
    (batch,) = load_batches(make_one_pass_batches(MemoryStore([3]), 16, 4), range(4))
    assert batch["segment_ids"].sum() == 3
    passes = load_batches(
        make_one_pass_batches(MemoryStore([64]), 16, 1), [0], num_steps=2
    )
    assert [batch["tokens"][0, 0] for batch in passes] == [0, 16]


@pytest.mark.parametrize(
    ("lengths", "weights", "expected"),
    [
        (
            [4, 6],
            {"web": 1},
            "store 'web': the corpus has 10 tokens, fewer than seq_len=16; give",
        ),
        (
            [99],
            {"wbe": 1},
            "weights: weights are for ['wbe'], stores are ['web']; give each store",
        ),
        (None, {}, "weights: no stores to mix; name at least one store"),
    ],
)
def test_refusals(lengths, weights, expected):
    stores = {"web": MemoryStore(lengths)} if lengths else {}
    assert message(make_batches, stores, weights, config(), seed=0).startswith(expected)
