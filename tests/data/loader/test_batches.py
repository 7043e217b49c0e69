"""The batch at step s is a function of (stores, mixture, seed, s), and holds what it should."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.loader import LoaderConfig, make_batches, make_loader, read_once
from tests.errors import message

documents = st.lists(st.integers(2, 40), min_size=4, max_size=30).filter(lambda x: sum(x) >= 16)
methods = st.sampled_from(["concat", "best_fit"])


def rows_by_hand(batch, store):
    """Checks every place of a batch against the documents, one at a time."""
    seen = []
    starts = set(store.offsets.tolist())
    for row in range(batch["tokens"].shape[0]):
        segment, position = 0, -1
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


def stores_of(memory_store, lengths):
    return {"a": memory_store(lengths), "b": memory_store([n + 3 for n in lengths])}


def config(**changes):
    return LoaderConfig(**{"seq_len": 16, "batch_size": 8, "packing_block": 7, **changes})


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert np.array_equal(a[name], b[name]), name


@given(lengths=documents, method=methods, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_token_once(memory_store, lengths, method, seed, epoch):
    store = memory_store(lengths)
    batches = make_batches({"a": store}, {"a": 1}, config(batch_size=1, packing=method), seed=seed)
    size = batches.sources[0].packing.num_sequences
    seen = [
        token
        for step in range(epoch * size, (epoch + 1) * size)
        for token in rows_by_hand(batches.rows(step), store)
    ]
    assert sorted(seen) == list(range(store.num_tokens))


def host_rows(batch_size, host, hosts):
    return range(batch_size * host // hosts, batch_size * (host + 1) // hosts)


@given(lengths=documents, method=methods, seed=st.integers(0, 99), step=st.integers(0, 10**12))
def test_one_batch_on_1_2_4_hosts_and_by_single_rows(memory_store, lengths, method, seed, step):
    batches = make_batches(
        stores_of(memory_store, lengths), {"a": 2, "b": 1}, config(packing=method), seed=seed
    )
    whole = batches.rows(step)
    assert whole["tokens"].shape == (8, 16)
    layouts = [[host_rows(8, p, count) for p in range(count)] for count in (1, 2, 4)]
    for layout in [*layouts, [[r] for r in range(8)]]:
        parts = [batches.rows(step, rows) for rows in layout]
        assert_equal(whole, {n: np.concatenate([part[n] for part in parts]) for n in whole})
    odd = [7, 0, 3]
    assert_equal({n: whole[n][odd] for n in whole}, batches.rows(step, odd))


@given(step=st.integers(0, 2**40), seed=st.integers(0, 99))
def test_a_pickled_copy_makes_the_same(memory_store, step, seed):
    for method in ("concat", "best_fit"):
        made = make_batches(
            {"a": memory_store([20, 30])}, {"a": 1}, config(packing=method), seed=seed
        )
        assert_equal(made.rows(step), pickle.loads(pickle.dumps(made)).rows(step))


def test_epochs_and_seeds_differ(memory_store):
    store = memory_store([1600])
    first, other = (
        make_batches({"a": store}, {"a": 1}, config(batch_size=100), seed=s) for s in (0, 1)
    )
    orders = [tuple(b.rows(step)["tokens"][:, 0]) for b in (first, other) for step in (0, 1)]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_another_store_does_not_change_a_store_s_order(memory_store):
    a, b = memory_store([800]), memory_store([900])
    alone = make_batches({"a": a}, {"a": 1}, config(), seed=4)
    both = make_batches({"b": b, "a": a}, {"a": 3, "b": 1}, config(), seed=4)
    _, order_alone = alone.order.locate(np.arange(64))
    stores, streams = both.order.mixture.locate(np.arange(512))
    _, order_both = both.order.locate(np.arange(512))
    first = np.argsort(streams[stores == 1])[:64]
    assert np.array_equal(order_both[stores == 1][first], order_alone)


def test_without_shuffle_reads_in_store_order(memory_store):
    store = memory_store([5, 60, 20])
    batches = make_batches({"a": store}, {"a": 1}, config(batch_size=6, shuffle=False), seed=0)
    seen = rows_by_hand(batches.rows(0), store)
    assert seen == list(range(85))
    assert_equal(batches.rows(0), batches.rows(1))


def test_rows_per_store_follow_the_weights(memory_store):
    """A store's share is of sequences; here each store's tokens show whose they are."""
    stores = {"small": memory_store([160]), "large": memory_store([0, 3200])}
    batches = make_batches(stores, {"small": 0.3, "large": 0.7}, config(), seed=0)
    owners, _ = batches.order.locate(np.arange(8 * 1000))
    assert abs(owners.mean() - 0.7) < 0.001


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 10**9), count=st.integers(1, 4), hosts=st.sampled_from([1, 2, 4]))
def test_resume_at_any_step_on_any_hosts(memory_store, first, count, hosts):
    stores, weights = stores_of(memory_store, [5, 30, 9]), {"a": 1, "b": 2}
    made = config(workers=0)
    batches = make_batches(stores, weights, made, seed=3)
    for host in range(hosts):
        with make_loader(
            stores, weights, made, seed=3, start_step=first, num_steps=count,
            rows=host_rows(8, host, hosts),
        ) as loader:  # fmt: skip
            for step in range(first, first + count):
                assert loader.step == step
                assert_equal(next(loader), batches.rows(step, host_rows(8, host, hosts)))
            with pytest.raises(StopIteration):
                next(loader)


@settings(max_examples=30, deadline=None)
@given(lengths=documents, method=methods, hosts=st.sampled_from([1, 2]), size=st.integers(1, 5))
def test_one_pass_reads_every_token_once_in_constant_shapes(
    memory_store, lengths, method, hosts, size
):
    store = memory_store(lengths)
    seen, weight = [], 0.0
    for host in range(hosts):
        passes = read_once(
            store, 16, size * hosts, packing=method, packing_block=7,
            rows=host_rows(size * hosts, host, hosts),
        )  # fmt: skip
        for batch in passes:
            assert batch["tokens"].shape == (size, 16)
            seen += rows_by_hand(batch, store)
            weight += batch["weights"].sum()
    assert sorted(seen) == list(range(store.num_tokens))
    assert weight == store.num_tokens - len(lengths)


def test_one_pass_takes_a_short_store_and_stops_early(memory_store):
    (batch,) = read_once(memory_store([3]), 16, 4)
    assert batch["segment_ids"].sum() == 3
    passes = read_once(memory_store([64]), 16, 1, max_batches=2)
    assert [batch["tokens"][0, 0] for batch in passes] == [0, 16]


def test_refusals(memory_store):
    stores = {"web": memory_store([4, 6])}
    assert message(make_batches, stores, {"web": 1}, config(), seed=0) == (
        "store 'web': the corpus has 10 tokens, fewer than seq_len=16; "
        "give more text, or lower seq_len"
    )
    assert message(make_batches, {}, {}, config(), seed=0) == (
        "weights: no stores to mix; name at least one store"
    )
    assert message(make_batches, stores, {"wbe": 1}, config(), seed=0) == (
        "weights: weights are for ['wbe'], stores are ['web']; give each store one weight"
    )
    assert message(read_once, memory_store([]), 16, 4) == (
        "evaluation: the store has no tokens; give some text"
    )
