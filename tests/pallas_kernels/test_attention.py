"""Attention on XLA equals a float64 NumPy softmax, its gradients too, and never reads what is
masked."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels import attention as kernel
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import PLACES, Case, cases, check, compiled
from tests.pallas_kernels.reference import operands

attention, forward, backward = (
    compiled(f) for f in (kernel.attention, kernel.attention_forward, kernel.attention_backward)
)
check_xla = partial(
    check,
    partial(kernel.attention_forward, backend="xla"),
    partial(kernel.attention_backward, backend="xla"),
)


def exact(q, k, v, **options):
    return reference.attention(q, k, v, **options)[0]


@given(cases())
def test_every_kind_of_attention_equals_the_reference(case):
    check_xla(case)


ALL = Case((2, 130, 140, 4, 2, 6, 9), "float32", True, 50, True, True, 2.0, True, True, "", 1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("features", [{}, {"prefix": False}, {"causal": False, "window": None}])
def test_all_features_at_once(features, place):
    prefix = features.get("causal", True) and features.get("prefix", True)
    check_xla(ALL._replace(place=place, **{**features, "prefix": prefix}))


PLAIN = Case((1, 256, 256, 4, 2, 32, 32), "bfloat16", True, None, *4 * (False,), False, "default", 3)


@pytest.mark.parametrize(
    "features",
    [{}, {"causal": False}, {"window": 20, "packed": True}, {"slopes": True, "sinks": True}],
)
def test_half_precision_costs_no_more_than_in_plain_attention(features):
    check_xla(PLAIN._replace(soft_cap=None, **features), rounding=0)
