"""The GPU kernels, interpreted on CPU, equal a float64 NumPy softmax with the same mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention as kernel
from pallas_kernels.attention import hopper, hopper_backward, triton
from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.attention.triton_program import TritonTiles
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import Case, check

FULL = AttentionParams(causal=False, window=None, soft_cap=None, scale=0.2)
SMALL = triton.TritonBlockSizes(
    TritonTiles(32, 16, 4, 1), TritonTiles(16, 32, 4, 1), TritonTiles(16, 32, 4, 1)
)
TRITON = {"backend": "triton", "block_sizes": SMALL, "interpret": True}


def check_with(kernels, case, **bounds):
    forward, backward = (
        partial(f, **kernels) for f in (kernel.attention_forward, kernel.attention_backward)
    )
    check(forward, backward, case, **bounds)


ALL = {"window": 9, "prefix": True, "packed": True, "soft_cap": 2.0, "slopes": True, "sinks": True}
# Lengths and heads that no block divides, or all.
CASES = {
    "everything": Case((2, 50, 77, 4, 2, 16, 32), place="static", seed=10, **ALL),
    "window, sinks": Case(
        (2, 50, 77, 4, 2, 16, 16), window=21, sinks=True, place="traced", seed=11
    ),
    "MLA": Case((1, 33, 33, 2, 1, 192, 128)),
    "a query": Case((1, 1, 37, 3, 1, 80, 80), place="static", seed=0),
    "full": Case((1, 64, 64, 2, 2, 32, 32), causal=False),
    "full, slopes, packed": Case((2, 45, 70, 4, 2, 40, 40), causal=False, slopes=True, packed=True),
}


@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_equal_the_reference(case):
    check_with(TRITON, CASES[case])


def test_half_precision_costs_no_more_than_in_plain_attention():
    check_with(TRITON, Case((2, 96, 96, 4, 2, 32, 32), "bfloat16"), rounding=0)


# One compiled program for the tests that follow.

B, S, T, N, K, H = 2, 50, 77, 4, 2, 16
SINKS = np.array([-1.0, 0.0, 2.0, -np.inf], np.float32)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def attended(q, k, v, d_o, places):
    """Output and gradients, sinks' last, as JAX differentiates attention."""

    def attend(q, k, v, sinks):
        return kernel.attention(q, k, v, sinks=sinks, window=30, **places, **TRITON)

    o, pull = jax.vjp(attend, q, k, v, jnp.asarray(SINKS))
    return o, *pull(d_o)


def operands(seed=0):
    d_o = np.random.default_rng(seed + 1).standard_normal((B, S, N, H)).astype(np.float32)
    return *reference.operands(B, S, T, N, K, H, seed), d_o


@settings(max_examples=8)
@given(st.integers(0, 9999), st.sampled_from([1, 5, 40, 200]))
def test_gradients_at_any_positions_and_segments(seed, spread):
    """Positions in any order; documents and padding of any length, in queries and keys alike."""
    rng = np.random.default_rng(seed)
    places = {
        "q_positions": rng.integers(0, spread, (B, S)).astype(np.int32),
        "k_positions": rng.integers(0, spread, (1, T)).astype(np.int32),
        "segment_ids": tuple(reference.packed(rng, B, n) for n in (S, T)),
    }
    q, k, v, d_o = operands(seed)
    o, _, *grads = reference.attention(q, k, v, d_o=d_o, sinks=SINKS, window=30, **places)
    found = attended(q, k, v, d_o, places)
    for x, wanted in zip(found, (o, *grads), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, wanted, atol=2e-5)
    for x in (found[0], found[1]):
        np.testing.assert_array_equal(np.asarray(x)[places["segment_ids"][0] == 0], 0)


def test_what_one_query_sees_never_leaks_to_another():
    """Any finite value may lie in the future, in another document, in padding."""
    segments = tuple(
        np.repeat(np.array([[1, 2, 0]], np.int32).repeat(B, axis=0), cuts, axis=1)
        for cuts in ((20, 20, 10), (30, 30, 17))
    )
    places = {
        "q_positions": np.arange(S, dtype=np.int32)[None].repeat(B, axis=0),
        "k_positions": np.arange(T, dtype=np.int32)[None] - 10,
        "segment_ids": segments,
    }
    q, k, v, d_o = operands()
    (own,), (keys,) = np.nonzero(segments[0][0] == 2), np.nonzero(segments[1][0] == 2)
    keys = keys[keys - 10 <= own[-1]]
    elsewhere = np.setdiff1d(np.arange(T), keys)
    d_o[:, np.setdiff1d(np.arange(S), own)] = 0
    clean = attended(q, k, v, d_o, places)
    k[:, elsewhere], v[:, elsewhere] = -3e38, 3e38
    dirty = attended(q, k, v, d_o, places)
    for x, y, mine in zip(dirty[:4], clean[:4], (own, own, keys, keys), strict=True):
        assert np.any(y[:, mine])
        np.testing.assert_array_equal(x[:, mine], y[:, mine])


def test_triton_takes_one_dtype_and_heads_of_256_at_most():
    def supported(H=64, Hv=64, k_dtype=jnp.float32, dtype=jnp.float32, S=9):
        q, k, v = (
            jax.ShapeDtypeStruct((1, S, 2, size), x)
            for size, x in ((H, dtype), (H, k_dtype), (Hv, dtype))
        )
        return triton.supports(q, k, v, AttentionOperands(), FULL)

    assert supported()
    assert supported(1, 256)
    assert not supported(257)
    assert not supported(k_dtype=jnp.bfloat16)
    assert not supported(dtype=jnp.int8, k_dtype=jnp.int8)
    assert not supported(S=0)


# Hopper's kernels.

INTERPRETED = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="no interpreter that knows these kernels"
)
HOPPER = {
    "causal, past the last block": Case(
        (1, 136, 264, 2, 1, 64, 64), "bfloat16", place="static", seed=5
    ),
    "everything": Case(
        (1, 152, 144, 2, 1, 64, 64), "bfloat16", place="traced", seed=10, **ALL | {"window": 90}
    ),
}


@INTERPRETED
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_kernels_equal_the_reference_without_races(case):
    parameters = plgpu.InterpretGPUParams(detect_races=True)
    check_with({"backend": "hopper", "interpret": parameters}, HOPPER[case])


@INTERPRETED
def test_jax_differentiates_hopper_kernels_in_blocks_of_any_size():
    """In fp16, without a mask."""
    case = Case((1, 128, 128, 2, 1, 64, 64), "float16", causal=False)
    (q, k, v), d_o = case.arrays()
    sizes = hopper.HopperBlockSizes(
        hopper.HopperForwardBlocks(64, 3), hopper_backward.HopperBackwardBlocks(64, 128, 1)
    )
    options = case.options() | {"backend": "hopper", "interpret": True, "block_sizes": sizes}
    o, pull = jax.vjp(partial(kernel.attention, **options), q, k, v)
    wide = (x.astype(np.float64) for x in (q, k, v))
    wanted = reference.attention(*wide, d_o=d_o.astype(np.float64), **case.options())
    for x, y in zip((o, *pull(d_o)), (wanted[0], *wanted[2:]), strict=True):
        assert x.dtype == np.float16
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=0.02)


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="there is an interpreter")
def test_without_an_interpreter_asking_for_it_is_refused():
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="no interpreter for Hopper's kernels"):
        kernel.attention(q, q, q, backend="hopper", interpret=True)


def test_gradients_of_heads_of_256_are_by_triton_on_hopper_too():
    case = Case((1, 40, 48, 2, 1, 256, 256), "bfloat16", place="static", seed=9)
    (q, k, v), d_o = case.arrays()
    options = case.options()
    wide = (x.astype(np.float64) for x in (q, k, v))
    o, lse, *wanted = reference.attention(*wide, d_o=d_o.astype(np.float64), **options)
    lse, delta = (x.astype(np.float32) for x in (lse, np.sum(o * d_o, axis=-1)))
    sizes = hopper.HopperBlockSizes(hopper.HopperForwardBlocks(64, 2), SMALL)
    options |= {"backend": "hopper", "interpret": True, "block_sizes": sizes}
    found = kernel.attention_backward(q, k, v, lse, delta, d_o, **options)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=0.02)


def test_what_hopper_does_not_take_is_refused():
    def refused(H, S=128, operands=None, dtype=jnp.bfloat16):
        q, k, v = (jnp.zeros((1, n, 2, H), dtype) for n in (S, 128, 128))
        row = jnp.zeros(q.shape[:3])
        operands = operands or AttentionOperands()
        assert not hopper.supports(q, k, v, operands, FULL)
        with pytest.raises(ValueError, match=rf"q \(1, {S}, 2, {H}\)"):
            hopper.forward(q, k, v, operands, FULL, dtype)
        with pytest.raises(ValueError, match=rf"q \(1, {S}, 2, {H}\)"):
            hopper.backward(q, k, v, row, row, q, operands, FULL, dtype)

    refused(80)
    refused(128, S=129)
    refused(128, dtype=jnp.float32)
    refused(64, operands=AttentionOperands(q_positions=jnp.zeros((1, 128), jnp.int32)))
    q = jnp.zeros((1, 128, 2, 256), jnp.bfloat16)
    assert hopper.supports(q, q, q, AttentionOperands(), FULL)
    assert not hopper.supports_backward(q, q, q, AttentionOperands(), FULL)
