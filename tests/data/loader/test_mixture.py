"""Weights are kept, every store's stream is read in full, and any index is answered alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.loader.mixture import BLOCK, Mixture

weight_lists = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6)
keys = st.none() | st.integers(0, 2**64 - 1)


def mixture(weights, key=5):
    return Mixture.of({str(i): w for i, w in enumerate(weights)}, key)


@given(weights=weight_lists, total=st.integers(1, 5000))
def test_counts_stay_within_two_of_the_weights(weights, total):
    stores, _ = mixture(weights, None).locate(np.arange(total))
    counts = np.bincount(stores, minlength=len(weights))
    assert np.abs(counts - total * np.array(weights) / sum(weights)).max() <= 2


def test_far_along_the_weights_hold():
    """A drift of a share would show in the streams' own indices by now."""
    weights = np.array([3.0, 1.0, 1e-6])
    stores, streams = mixture(weights).locate(np.arange(10**17, 10**17 + 10**4))
    for store in (0, 1):
        expected = 10**17 * weights[store] / weights.sum()
        assert abs(streams[stores == store].mean() / expected - 1) < 1e-6


@given(weights=weight_lists, key=keys, high=st.integers(1, 2**30))
def test_no_sequence_is_lost_where_the_arithmetic_is_split(weights, key, high):
    first = high * 2**31 - BLOCK
    stores, streams = mixture(weights, key).locate(np.arange(first, first + 2 * BLOCK))
    for store in np.unique(stores):
        given_out = np.sort(streams[stores == store])
        assert (np.diff(given_out) == 1).all()


def test_no_store_sits_at_fixed_rows():
    stores, _ = mixture([1, 1]).locate(np.arange(8 * 400))
    share = stores.reshape(400, 8).mean(0)
    assert (np.abs(share - 0.5) < 0.15).all()
    plain, _ = mixture([1, 1], None).locate(np.arange(8 * 400))
    assert (np.abs(plain.reshape(400, 8).mean(0) - 0.5) == 0.5).all()


def test_the_order_of_the_mapping_does_not_matter():
    a = Mixture.of({"x": 1, "y": 1, "z": 2}, 3).locate(np.arange(999))[0]
    b = Mixture.of({"z": 2, "y": 1, "x": 1}, 3).locate(np.arange(999))[0]
    assert np.array_equal(np.array(list("xyz"))[a], np.array(list("zyx"))[b])


@pytest.mark.parametrize("weight", [0, -1.5, float("nan"), float("inf")])
def test_refuses_weights(weight):
    with pytest.raises(MaxlmError) as error:
        Mixture.of({"web": 1.0, "code": weight}, 0)
    assert str(error.value) == (
        f"weights: the weight of store 'code' is {weight}, not a positive number; "
        "give a weight above 0, or leave the store out"
    )


def test_refuses_no_stores():
    with pytest.raises(MaxlmError) as error:
        Mixture.of({}, 0)
    assert str(error.value) == "weights: no stores to mix; name at least one store"
