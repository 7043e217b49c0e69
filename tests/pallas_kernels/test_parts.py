"""Attention a part of the batch and of the heads at a time: the same results, in bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention as kernel
from pallas_kernels.attention import xla
from pallas_kernels.attention.parts import BatchSlice
from tests.pallas_kernels.cases import Case, compiled


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 99), st.integers(1, 3))
def test_parts_are_everything_once_and_not_too_large(batch, kv_heads, most, group):
    part = BatchSlice.of(batch, kv_heads, most)
    assert part.rows * part.kv_heads <= max(most, 1)
    x = jnp.arange(1, batch * 2 * kv_heads * group + 1).reshape(batch, 2, kv_heads * group)
    total = jnp.zeros_like(x)
    for i in range(part.count):
        own = part.cut(jnp.int32(i), (x,))
        assert own[0].shape == (part.rows, 2, part.kv_heads * group)
        rows = part.cut_rows(jnp.int32(i), x[:, 0, 0])
        heads = part.cut_heads(jnp.int32(i), x[0, 0])
        np.testing.assert_array_equal(own[0][:, 0], rows[:, None] + heads - 1)
        total += part.put(jnp.int32(i), (jnp.zeros_like(x),), own)[0]
    np.testing.assert_array_equal(total, x)


def both_passes(q, k, v, d_o, **options):
    o, lse = kernel.attention_forward(q, k, v, **options)
    delta = kernel.compute_row_delta(o, d_o)
    options.pop("sinks", None)
    return o, lse, kernel.attention_backward(q, k, v, lse, delta, d_o, **options)


# Rows and kv heads in a part of 3 rows and 6 kv heads, by the room there is for scores.
@pytest.mark.parametrize(("pairs", "shape"), [(6, (1, 6)), (3, (1, 3)), (99, (3, 6))])
@pytest.mark.parametrize(("dtype", "one_by_one"), [("float32", False), ("bfloat16", True)])
def test_values_and_gradients_are_those_of_the_whole(monkeypatch, pairs, shape, dtype, one_by_one):
    """With all that a row or a head has of its own; fp32 gradients of bf16 operands are not
    rounded on the way."""
    B, S, N, K = 3, 5, 12, 6
    features = {"prefix": True, "packed": True, "slopes": True, "sinks": True, "reach": 3}
    case = Case((B, S, S, N, K, 4, 3), dtype, seed=2, **features)
    (q, k, v), d_o = case.arrays()
    options = case.options()
    if one_by_one:
        options["q_positions"] = np.sort(np.random.default_rng(0).integers(0, 9, (B, S)), axis=1)

    want = compiled(both_passes)(q, k, v, d_o, **options)
    # One pair's scores: 2 query heads, 5 queries, 5 keys, in fp32.
    monkeypatch.setattr(xla, "SCORE_BYTES", pairs * 4 * 2 * S * S)
    assert xla._part(q, k) in (None, BatchSlice((B, K), *shape))
    got = compiled(both_passes)(q, k, v, d_o, **options)
    assert [x.dtype for x in got[:2] + got[2]] == [x.dtype for x in want[:2] + want[2]]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
