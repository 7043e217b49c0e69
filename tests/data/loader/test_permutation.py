"""A keyed permutation of range(n): exact, stateless, without visible pattern."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.data.loader.permutation import derive_key, derive_keys, permute

keys = st.integers(0, 2**64 - 1)
GOLDEN_SMALL = [0, 5, 2, 7, 4, 6, 8, 1]
GOLDEN_LARGE = [831524700906, 674818367796, 847717140350]


@given(n=st.integers(1, 3000), key=keys)
def test_is_a_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 1 << 62), key=keys, data=st.data())
def test_any_size_and_any_index_alone(n, key, data):
    indices = data.draw(
        st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True)
    )
    together = permute(np.array(indices), n, key)
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(indices)
    assert [int(permute(i, n, key)[0]) for i in indices] == together.tolist()


def test_golden_values():
    """Old runs must resume with the batches they had: these may never change."""
    assert (
        permute(np.arange(8), 10, derive_key(0, "shuffle", "a")).tolist()
        == GOLDEN_SMALL
    )
    assert (
        permute(np.arange(3), 10**12, derive_key(1, "mixture")).tolist() == GOLDEN_LARGE
    )


def test_keys_differ():
    orders = {
        tuple(permute(np.arange(100), 100, derive_key(seed))) for seed in range(200)
    }
    assert len(orders) == 200
    assert derive_key(1, "a") != derive_key("1", "a") != derive_key(1, "b")


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    """Chi-square over all n! orders, 400 expected of each; the bound is about six
    sigma."""
    orders = list(permutations(range(n)))
    many = derive_keys(n, np.arange(400 * len(orders)))
    columns = np.stack(
        [permute(np.full(many.size, i), n, many) for i in range(n)], axis=1
    )
    counts = Counter(map(tuple, columns.tolist()))
    chi2 = sum((counts[order] - 400) ** 2 / 400 for order in orders)
    freedom = len(orders) - 1
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5
