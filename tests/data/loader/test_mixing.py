"""Weights are kept, every stream is read in full, any index is answered alone; caps on
epochs, temperature, phases and ramps."""

import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.data.config import DataConfig
from maxlm.data.loader.batches import load_batches, make_batches
from maxlm.data.loader.mixture import BLOCK, ENDLESS, Mixing, MixtureOrder, Phase
from maxlm.data.loader.usage import list_phase_steps, summarize_source_usage
from tests.data.loader.memory import MemoryStore, config
from tests.errors import message

names = ("a", "b", "c", "d")
weights = st.fixed_dictionaries(
    {name: st.just(0.0) | st.floats(0.01, 10) for name in names}
)
some_weights = weights.filter(lambda w: sum(w.values()) > 0)
caps = st.dictionaries(st.sampled_from(names), st.integers(1, 3000))
keys = st.none() | st.integers(0, 2**64 - 1)
changes = st.lists(
    st.tuples(st.integers(1, 4000), some_weights),
    max_size=3,
    unique_by=lambda change: change[0],
).map(sorted)


def mixture(first, later=(), most=None, key=5):
    read = {n for w in (first, *(w for _, w in later)) for n in names if w[n] > 0}
    phases = [
        ({n: w[n] for n in names if n in read}, t) for t, w in [(0, first), *later]
    ]
    most = {n: count for n, count in (most or {}).items() if n in read}
    return MixtureOrder.of([(t, w) for w, t in phases], key, most), phases, most


ENDS_WITH_ITS_PHASE = {
    "first": {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0},
    "later": [(100, {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0})],
    "most": {"a": 5},
    "key": 5,
}


@pytest.mark.heavy
@example(**ENDS_WITH_ITS_PHASE)
@given(first=some_weights, later=changes, most=caps, key=keys)
def test_streams_have_no_gap_no_repeat_and_stop_at_their_caps(first, later, most, key):
    order, phases, most = mixture(first, later, most, key)
    total = min(order.end, 6000)
    whole = order.end < ENDLESS and order.end <= 6000
    stores, streams = order.locate(np.arange(total))
    limits = [most.get(name, ENDLESS) for name in order.names]
    for store, limit in enumerate(limits):
        mine = np.sort(streams[stores == store])
        assert np.unique(mine).size == mine.size
        assert mine.size == 0 or mine[-1] < limit
        if whole or key is None:
            assert np.array_equal(mine, np.arange(mine.size))
    if whole:
        # What could still have been read at the end had weight 0 there.
        at_end = [weights for weights, start in phases if start <= order.end][-1]
        for store in np.flatnonzero(list(at_end.values())):
            assert (stores == store).sum() == limits[store]
        with pytest.raises(IndexError):
            order.locate(np.array([order.end]))


@given(first=some_weights, later=changes, most=caps, key=keys, data=st.data())
def test_any_index_alone(first, later, most, key, data):
    order, _, _ = mixture(first, later, most, key)
    total = min(order.end, 6000)
    stores, streams = order.locate(np.arange(total))
    some = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=5))
    alone = [order.locate(np.array([i])) for i in some]
    assert [(a[0], b[0]) for a, b in alone] == [(stores[i], streams[i]) for i in some]


@given(
    first=some_weights, later=changes, most=caps, key=keys, index=st.integers(0, 6000)
)
def test_counts_before_an_index_are_those_of_what_is_located(
    first, later, most, key, index
):
    order, _, _ = mixture(first, later, most, key)
    stores, _ = order.locate(np.arange(min(index, order.end)))
    counts = np.bincount(stores, minlength=len(order.names)).tolist()
    assert order.count_sequences_before(index) == dict(
        zip(order.names, counts, strict=True)
    )


@pytest.mark.parametrize(
    ("shuffle", "packing", "digest"),
    [
        (True, "concat", "cddf685d20cd8858"),
        (True, "best_fit", "9cf60e9f60d4b1d9"),
        (False, "concat", "8497891c4ddd1d23"),
        (False, "best_fit", "a382f25c5b5158f1"),
    ],
)
def test_batches_of_constant_weights_stay_as_they_were(shuffle, packing, digest):
    """A run begun with an older version goes on with the batches it would have had."""
    lengths = {"web": [5, 60, 20] * 9, "code": [33] * 7, "wiki": [17, 2] * 8}
    stores = {
        name: MemoryStore(store_lengths) for name, store_lengths in lengths.items()
    }
    shares = {"web": 0.7, "code": 0.2, "wiki": 0.1}
    batches = make_batches(
        stores, shares, config(shuffle=shuffle, packing=packing), seed=3
    )
    hasher = hashlib.sha256()
    for step in (0, 1, 2, 63, 64, 10**6, 10**12):
        for name, values in sorted(batches.rows(step).items()):
            hasher.update(name.encode() + values.tobytes())
    assert hasher.hexdigest().startswith(digest)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
def test_a_capped_store_is_read_exactly_so_often(method):
    stores = {"small": MemoryStore([30, 9, 40] * 4), "large": MemoryStore([50] * 40)}
    mixing = Mixing({"small": 1, "large": 1}, max_epochs={"small": 2, "large": 1})
    batches = make_batches(stores, mixing, config(packing=method, batch_size=1), seed=0)
    assert batches.num_steps == sum(
        s.num_sequences * n for s, n in zip(batches.sources, (2, 1), strict=True)
    )
    for name, store, epochs in (("small", 0, 2), ("large", 1, 1)):
        steps = [
            s
            for s in range(batches.num_steps)
            if batches.locate(np.array([s]))[0] == store
        ]
        rows = [batches.rows(step) for step in steps]
        seen = np.concatenate([r["tokens"][r["segment_ids"] > 0] for r in rows])
        every = np.repeat(np.arange(stores[name].num_tokens), epochs)
        assert np.array_equal(np.sort(seen), every)
    with pytest.raises(IndexError, match="ends after"):
        batches.rows(batches.num_steps)


def test_a_loader_ends_with_its_mixture_or_refuses():
    stores = {"web": MemoryStore([160])}
    mixing = Mixing({"web": 1}, max_epochs={"web": 2.5})
    batches = make_batches(stores, mixing, config(), seed=0)
    with load_batches(batches, range(8), start_step=1) as loader:
        assert len(list(loader)) == 2  # 25 sequences are 3 whole batches of 8.
    with pytest.raises(
        MaxlmError, match=r"data.sources: the mixture ends after 3 of 6 steps: eve"
    ):
        load_batches(batches, range(8), start_step=1, num_steps=5)


def shares_of(mixing, step, sizes=(1600, 16000, 160000)):
    stores = {n: MemoryStore([size]) for n, size in zip("abc", sizes, strict=True)}
    return make_batches(stores, mixing, config(), seed=0).mixture.shares(step * 8)


def test_temperature_is_mt5_s():
    for temperature, alpha in ((1.0, 1.0), (1 / 0.3, 0.3), (1e9, 0.0)):
        shares = shares_of(Mixing(dict.fromkeys("abc", 1), temperature=temperature), 0)
        powers = np.array([1600, 16000, 160000]) ** alpha
        assert np.allclose(list(shares.values()), powers / powers.sum())
    weighted = shares_of(Mixing({"a": 2, "b": 1, "c": 1}, temperature=1e9), 0)
    assert np.allclose(list(weighted.values()), [0.5, 0.25, 0.25])


def test_phases_begin_with_their_step():
    """Also within a block of shuffling, and a source waits at weight 0 for its
    phase."""
    stores = {n: MemoryStore([16000]) for n in "abc"}
    phases = (
        Phase(from_step=11, weights={"a": 0, "c": 1}),
        Phase(from_step=50, weights={"b": 0}),
    )
    batches = make_batches(
        stores, Mixing({"a": 1, "b": 1, "c": 0}, phases=phases), config(), seed=1
    )
    owners = batches.locate(np.arange(100 * 8))[0].reshape(100, 8)
    read = [set(np.unique(owners[a:b])) for a, b in ((0, 11), (11, 50), (50, 100))]
    assert read == [{0, 1}, {1, 2}, {0}]
    assert batches.mixture.shares(11 * 8) == {"a": 0, "b": 0.5, "c": 0.5}


RAMP = Phase(from_step=1000, ramp_steps=3200, weights={"a": 8, "b": 1, "c": 1})


def test_a_ramp_moves_shares_along_a_line():
    """The stair's middle is on the line, so its ends are half a stair away from it."""
    mixing = Mixing({"a": 1, "b": 0.5, "c": 0.5}, phases=(RAMP,))
    for step in range(0, 6000, 100):
        expected = 0.5 + 0.3 * min(max((step - 1000) / 3200, 0), 1)
        assert abs(shares_of(mixing, step)["a"] - expected) <= 0.3 / 64 / 2 + 1e-9
    assert shares_of(mixing, 999)["a"] == 0.5
    assert shares_of(mixing, 4200)["a"] == 0.8
    for steps in (
        1,
        3,
        40,
    ):  # Shorter than the stairs are many: each has sequences to round.
        short = Mixing(
            mixing.weights, phases=(RAMP.model_copy(update={"ramp_steps": steps}),)
        )
        assert shares_of(short, 999)["a"] == 0.5
        assert 0.5 < shares_of(short, 1000)["a"] < 0.8
        assert shares_of(short, 1000 + steps)["a"] == 0.8


def test_what_a_ramp_reads_is_the_lines_integral():
    """In float64, over any of its steps; and each source's stream goes on through
    it."""
    stores = {name: MemoryStore([16000]) for name in "abc"}
    mixing = Mixing({"a": 1, "b": 0.5, "c": 0.5}, phases=(RAMP,))
    order = make_batches(stores, mixing, config(), seed=0).mixture
    start, stop = 1000 * 8, 4200 * 8
    owners, streams = order.locate(np.arange(stop + 4000))
    line = 0.5 + 0.3 * np.clip(
        (np.arange(stop + 4000) + 0.5 - start) / (stop - start), 0, 1
    )
    for first, last in ((start, stop), (start, start + 5000), (20_000, stop + 4000)):
        expected = line[first:last].sum()
        # Two for each stair that is rounded, and one block that is cut at either end.
        bound = 2 * 64 + 2 * BLOCK
        assert abs((owners[first:last] == 0).sum() - expected) <= bound
    for store in range(3):
        mine = np.sort(streams[owners == store])
        assert np.diff(mine).max() <= BLOCK
        assert np.unique(mine).size == mine.size


def test_a_run_resumes_within_a_ramp_and_a_cap_with_the_batches_it_would_have_had():
    stores = {name: MemoryStore([500] * 9) for name in "abc"}
    phases = (
        Phase(from_step=10, ramp_steps=90, weights={"a": 8}),
        Phase(from_step=100, ramp_steps=30, weights={"a": 0.1, "c": 4}),
    )
    mixing = Mixing({"a": 1, "b": 1, "c": 0}, max_epochs={"b": 1.5}, phases=phases)
    unbroken = make_batches(stores, mixing, config(), seed=4)
    rows = [unbroken.rows(step)["tokens"] for step in range(140)]
    for start in (10, 37, 99, 100, 125):
        resumed = make_batches(stores, mixing, config(), seed=4)
        with load_batches(resumed, range(8), start_step=start, num_steps=4) as loader:
            for step, batch in enumerate(loader, start):
                assert np.array_equal(batch["tokens"], rows[step])


def test_the_usage_of_sources_counts_what_batches_hold():
    stores = {"web": MemoryStore([300, 20] * 20), "code": MemoryStore([100] * 3)}
    phases = (Phase(from_step=20, ramp_steps=10, weights={"code": 9}),)
    mixing = Mixing({"web": 3, "code": 1}, max_epochs={"code": 4}, phases=phases)
    batches = make_batches(stores, mixing, config(), seed=0)
    owners, _ = batches.locate(np.arange(200 * 8))
    assert list_phase_steps(phases, 200) == [(0, 20), (20, 30), (30, 200)]
    assert list_phase_steps(phases, 25) == [(0, 20), (20, 25)]
    for first, stop in [(5, 200), *list_phase_steps(phases, 200)]:
        web, code = summarize_source_usage(batches, first, stop)
        counts = np.bincount(owners[first * 8 : stop * 8], minlength=2).tolist()
        assert [web.sequences, code.sequences] == counts
        assert web.share + code.share == pytest.approx(1)
        assert code.epochs == counts[1] / 19
        assert code.tokens == round(300 * code.epochs)
        assert code.epochs_so_far == (owners[: stop * 8] == 1).sum() / 19
    assert summarize_source_usage(batches, 0, 10**6)[1].epochs == 4


def test_refusals():
    def refused(**settings):
        sources = [
            {"name": n, "documents": ["x"], "weight": w}
            for n, w in (("web", 1), ("q", 0))
        ]
        with pytest.raises(ValidationError) as error:
            DataConfig.model_validate({"sources": sources} | settings)
        return str(error.value)

    assert "phases.0.weights: there is no source 'wbe'; did you mean 'web'?" in refused(
        phases=[{"from_step": 0, "weights": {"wbe": 1}}]
    )
    assert "there is no source 'books'; sources are: web, q" in refused(
        phases=[{"from_step": 0, "weights": {"books": 1}}]
    )
    phase = {"from_step": 5, "weights": {"q": 1}}
    error_text = refused(phases=[phase, phase])
    assert (
        "phases.1: from_step=5 is not past the phase before; begin at step 6 or later"
        in error_text
    )
    ramp = {"from_step": 5, "ramp_steps": 10, "weights": {"q": 1}}
    error_text = refused(phases=[ramp, {"from_step": 14, "weights": {"q": 2}}])
    assert (
        "phases.1: from_step=14 is not past the phase before and its ramp; begin at st"
        in error_text
    )
    stores = {"web": MemoryStore([50]), "q": MemoryStore([50])}
    for mixing, expected in (
        (
            Mixing({"web": 1, "q": 0}),
            "weights: the weight of store 'q' is 0, not a positive",
        ),
        (
            Mixing({"web": 1, "q": float("nan")}),
            "weights: the weight of store 'q' is nan, not",
        ),
        (
            Mixing({"web": -1.5, "q": 1}),
            "weights: the weight of store 'web' is -1.5, not a",
        ),
        (
            Mixing(
                {"web": 0, "q": 0},
                phases=(Phase(from_step=3, weights={"web": 1, "q": 1}),),
            ),
            "weights: from step 0 on all weights are 0; give a source a weight above 0",
        ),
        (
            Mixing(
                {"web": 1, "q": 1},
                phases=(Phase(from_step=3, weights={"web": 0, "q": 0}),),
            ),
            "weights: from step 3 on all weights are 0; give a source a weight above 0",
        ),
    ):
        assert message(make_batches, stores, mixing, config(), seed=0).startswith(
            expected
        )


weight_lists = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6)


def even(weights, key=5):
    return MixtureOrder.of([(0, {str(i): w for i, w in enumerate(weights)})], key, {})


@given(weights=weight_lists, total=st.integers(1, 5000))
def test_counts_stay_within_two_of_the_weights(weights, total):
    stores, _ = even(weights, None).locate(np.arange(total))
    counts = np.bincount(stores, minlength=len(weights))
    assert np.abs(counts - total * np.array(weights) / sum(weights)).max() <= 2


@given(weights=weight_lists, key=keys, high=st.integers(1, 2**30))
def test_no_sequence_is_lost_where_the_arithmetic_is_split(weights, key, high):
    first = high * 2**31 - BLOCK
    stores, streams = even(weights, key).locate(np.arange(first, first + 2 * BLOCK))
    for store in np.unique(stores):
        given_out = np.sort(streams[stores == store])
        assert (np.diff(given_out) == 1).all()


def test_the_order_of_the_mapping_does_not_matter():
    a = MixtureOrder.of([(0, {"x": 1, "y": 1, "z": 2})], 3, {}).locate(np.arange(999))[
        0
    ]
    b = MixtureOrder.of([(0, {"z": 2, "y": 1, "x": 1})], 3, {}).locate(np.arange(999))[
        0
    ]
    assert np.array_equal(np.array(list("xyz"))[a], np.array(list("zyx"))[b])
