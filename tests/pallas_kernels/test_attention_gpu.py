"""The GPU kernels, interpreted on CPU, equal a float64 NumPy softmax with the same mask, and visit
the blocks that the mask leaves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks, hopper, triton
from pallas_kernels.attention.gpu_blocks import Visits
from pallas_kernels.attention.how import How, Where
from pallas_kernels.attention.triton_program import Tiles
from tests.pallas_kernels import exact, reference

QUICK = {"xla_backend_optimization_level": 0}
FULL = How(causal=False, window=None, prefix=False, soft_cap=None, scale=0.2)
CAUSAL = FULL._replace(causal=True)
SMALL = triton.BlockSizes(Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1))


@partial(jax.jit, static_argnames=("how", "dtype", "sizes"), compiler_options=QUICK)
def run(q, k, v, d_o, where, how, dtype=jnp.float32, sizes=SMALL):
    """(o, lse, dQ, dK, dV)"""
    options = {"block_sizes": sizes, "interpret": True}
    o, lse = triton.forward(q, k, v, where, how, dtype, **options)
    delta = jnp.sum(o.astype(jnp.float32) * d_o, axis=-1)
    grads = triton.backward(q, k, v, lse, delta, d_o, where, how, dtype, **options)
    return o, lse, *grads


def check(operands, how, where, atol=1e-5):
    found = run(*operands, where, how)
    for x, wanted in zip(found, exact.attention(*operands, how, where), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, wanted, atol=atol)
    return found


# (S, T, query heads, kv heads, H, Hv, causal): no multiples of a block, or all.
SHAPES = {
    "odd": (45, 70, 4, 2, 40, 40, False),
    "even": (64, 64, 2, 2, 32, 32, False),
    "MLA": (33, 33, 2, 1, 48, 32, True),
    "a query": (1, 37, 3, 1, 80, 80, True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_no_block_divides(shape):
    S, T, *rest, causal = SHAPES[shape]
    how, where = (CAUSAL, Where(q_offset=T - S)) if causal else (FULL, Where())
    check(exact.operands(2, S, T, *rest), how, where)


B, S, T, N, K = 2, 50, 77, 4, 2
SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
SINKS = np.array([-1.0, 0.0, 2.0, -np.inf], np.float32)
FEATURES = {
    "window, sinks": (CAUSAL._replace(window=21), {"sinks": SINKS}),
    "slopes": (FULL, {"slopes": SLOPES}),
    "soft cap": (FULL._replace(soft_cap=1.5), {}),
    "prefix": (CAUSAL._replace(prefix=True), {"prefix": np.array([40, 0], np.int32)}),
    "all": (
        CAUSAL._replace(window=9, prefix=True, soft_cap=2.0),
        {"prefix": np.array([3, 35], np.int32), "slopes": SLOPES, "sinks": SINKS},
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_at_an_offset(feature):
    how, arrays = FEATURES[feature]
    check(exact.operands(B, S, T, N, K, 16, 32), how, Where(q_offset=19, k_offset=2, **arrays))


@settings(max_examples=8)
@given(st.integers(0, 9999), st.sampled_from([1, 5, 40, 200]))
def test_any_positions_and_segments(seed, spread):
    """Positions in any order; documents and padding of any length, in queries and keys alike."""
    rng = np.random.default_rng(seed)
    where = Where(
        q_positions=rng.integers(0, spread, (B, S)).astype(np.int32),
        k_positions=rng.integers(0, spread, (1, T)).astype(np.int32),
        q_segments=reference.packed(rng, B, S),
        k_segments=reference.packed(rng, B, T),
    )
    check(exact.operands(B, S, T, N, K, 16, 16, seed), CAUSAL._replace(window=30), where)


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    segments = np.ones((B, S), np.int32)
    segments[0, 20:], segments[1] = 0, 0
    where = Where(q_segments=segments, k_segments=segments)
    operands = exact.operands(B, S, S, N, K, 16, 16)
    o, lse, *grads = check(operands, FULL, where)
    np.testing.assert_array_equal(np.asarray(o)[segments == 0], 0)
    np.testing.assert_array_equal(np.asarray(lse)[segments == 0], -np.inf)
    for grad in grads:
        np.testing.assert_array_equal(np.asarray(grad)[segments == 0], 0)


@pytest.mark.parametrize("garbage", [1e4, -3e38])
def test_masked_keys_and_values_never_leak(garbage):
    """Any finite value may lie in the future, in another document, in padding."""
    segments = np.repeat(np.array([[1, 2, 0]], np.int32), [20, 20, 10], axis=1)
    where = Where(q_segments=segments, k_segments=segments)
    q, k, v, d_o = exact.operands(1, S, S, N, K, 16, 16)
    mine = slice(20, 40)
    d_o[:, :20] = d_o[:, 40:] = 0
    clean = run(q, k, v, d_o, where, CAUSAL)
    for x, sign in ((k, 1), (v, -1)):
        x[:, :20] = x[:, 40:] = sign * garbage
    dirty = run(q, k, v, d_o, where, CAUSAL)
    for x, y in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(x[:, mine], y[:, mine])


def test_bf16_errs_no_more_than_xla():
    operands = [jnp.asarray(x, jnp.bfloat16) for x in exact.operands(2, 96, 96, 4, 2, 32, 32)]
    wanted = exact.attention(*operands, CAUSAL, Where())
    found = run(*operands, Where(), CAUSAL, jnp.bfloat16)

    @partial(jax.jit, compiler_options=QUICK)
    def by_xla(q, k, v, d_o):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, scale=CAUSAL.scale, is_causal=True)

        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(d_o)

    peer = by_xla(*operands)
    for x, y, exactly in zip((found[0], *found[2:]), peer, (wanted[0], *wanted[2:]), strict=True):
        assert x.dtype == jnp.bfloat16
        error, of_peer = (np.abs(np.asarray(z, np.float64) - exactly).mean() for z in (x, y))
        assert 0 < error <= 1.5 * of_peer


# Hopper's kernels: jax.experimental.pallas.mosaic_gpu's interpreter runs them from jax 0.12 on.

HOPPER = {
    "causal, past the last block": (136, 264, CAUSAL, {"q_offset": 128}),
    "full, an fp16 block": (128, 128, FULL, {}),
    "all": (
        152,
        144,
        CAUSAL._replace(window=90, prefix=True, soft_cap=2.0),
        {"prefix": np.array([40], np.int32), "slopes": SLOPES[:2], "sinks": SINKS[:2]},
    ),
}


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="no interpreter that knows these kernels"
)
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_kernels_equal_the_reference_without_races(case):
    S, T, how, arrays = HOPPER[case]
    rng = np.random.default_rng(1)
    dtype = jnp.float16 if "fp16" in case else jnp.bfloat16
    operands = [jnp.asarray(x, dtype) for x in exact.operands(1, S, T, 2, 1, 64, 64)]
    if case == "all":
        arrays = arrays | {"q_segments": reference.packed(rng, 1, S)}
        arrays = arrays | {"k_segments": reference.packed(rng, 1, T)}
    where = Where(**arrays)
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    q, k, v, d_o = operands
    wanted = exact.attention(q, k, v, d_o, how, where)
    o, lse = hopper.forward(q, k, v, where, how, jnp.float32, **options)
    np.testing.assert_allclose(o, wanted[0], atol=8e-3)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-5)
    lse, delta = (
        jnp.asarray(x, jnp.float32) for x in (wanted[1], np.sum(wanted[0] * d_o, axis=-1))
    )
    grads = hopper.backward(q, k, v, lse, delta, d_o, where, how, jnp.float32, **options)
    for x, y in zip(grads, wanted[2:], strict=True):
        np.testing.assert_allclose(x, y, atol=0.02)


def test_what_hopper_does_not_take_is_refused():
    def refused(H, S=128, where=None, dtype=jnp.bfloat16):
        q, k, v = (jnp.zeros((1, n, 2, H), dtype) for n in (S, 128, 128))
        where = where or Where()
        assert not hopper.supports(q, k, v, where, FULL)
        with pytest.raises(ValueError, match=rf"q \(1, {S}, 2, {H}\)"):
            hopper.forward(q, k, v, where, FULL, dtype)

    refused(80)
    refused(128, S=129)
    refused(128, dtype=jnp.float32)
    refused(64, where=Where(q_positions=jnp.zeros((1, 128), jnp.int32)))
    q = jnp.zeros((1, 128, 2, 256), jnp.bfloat16)
    assert hopper.supports(q, q, q, Where(), FULL)
    row = jnp.zeros(q.shape[:3])
    with pytest.raises(ValueError, match="heads of 64 or 128"):
        hopper.backward(q, q, q, row, row, q, Where(), FULL, q.dtype)


# Which blocks are visited.


def visited(row) -> tuple[list[int], list[int]]:
    """(blocks with a mask, blocks without) of a block's visits."""
    visits = Visits(*(jnp.asarray(x) for x in row))
    masked = np.asarray(visits.masked(jnp.arange(32)))[: int(visits.count)].tolist()
    return masked, list(range(int(visits.full_begin), int(visits.full_end)))


def judged(how, where, S, T, block_q, block_k):
    """bool [B, blocks of queries, blocks of keys]: whether any, whether all pairs are visible."""
    seen = exact.visible(S, T, how, where)
    pad = (0, 0), (0, -S % block_q), (0, -T % block_k)
    some, whole = (
        np.pad(seen, pad, constant_values=fill).reshape(
            len(seen), -(-S // block_q), block_q, -1, block_k
        )
        for fill in (False, True)
    )
    return some.any(axis=(2, 4)), whole.all(axis=(2, 4))


@settings(max_examples=20)
@given(
    st.integers(0, 9999),
    st.sampled_from([None, 1, 7, 30]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_blocks_are_visited_once_and_none_that_counts_is_missed(
    seed, window, prefix, packed, mixed
):
    rng = np.random.default_rng(seed)
    S, T = 43, 61
    how = CAUSAL._replace(window=window, prefix=prefix)
    where = Where(
        q_positions=rng.integers(0, 60, (2, S)).astype(np.int32) if mixed else None,
        q_offset=None if mixed else int(rng.integers(0, 30)),
        prefix=rng.integers(0, T, 2).astype(np.int32) if prefix else None,
        q_segments=reference.packed(rng, 2, S) if packed else None,
        k_segments=reference.packed(rng, 2, T) if packed else None,
    )
    some, whole = judged(how, where, S, T, 8, 4)
    tables = (
        (gpu_blocks.visits_of_queries(S, T, 8, 4, where, how), some, whole),
        (
            gpu_blocks.visits_of_keys(S, T, 8, 4, where, how),
            *(x.swapaxes(1, 2) for x in (some, whole)),
        ),
    )
    for table, some, whole in tables:
        for b, i in np.ndindex(table.shape[:2]):
            masked, full = visited(np.asarray(table)[b, i])
            blocks = masked + full
            assert len(set(blocks)) == len(blocks)
            assert set(np.flatnonzero(some[b, i])) <= set(blocks)
            assert whole[b, i, full].all()


WORK = {
    "causal": (CAUSAL, {}),
    "window": (CAUSAL._replace(window=64), {}),
    "prefix and window": (
        CAUSAL._replace(window=64, prefix=True),
        {"prefix": np.array([70], np.int32)},
    ),
    "packed": (
        CAUSAL,
        dict.fromkeys(
            ("q_segments", "k_segments"), np.repeat([[1, 2, 3, 4, 0]], [100, 200, 30, 100, 82], 1)
        ),
    ),
    "an offset": (CAUSAL, {"q_offset": 100}),
}


@pytest.mark.parametrize("case", WORK)
def test_work_is_what_the_mask_leaves(case):
    """Blocks visited are those with a pair to see, masked those with a pair not to see."""
    how, arrays = WORK[case]
    where = Where(**arrays)
    some, whole = judged(how, where, 512, 512, 32, 16)
    for table, axis in (
        (gpu_blocks.visits_of_queries(512, 512, 32, 16, where, how), 2),
        (gpu_blocks.visits_of_keys(512, 512, 32, 16, where, how), 1),
    ):
        counts = [[len(x) for x in visited(row)] for row in np.asarray(table)[0]]
        np.testing.assert_array_equal(np.sum(counts, axis=1), some[0].sum(axis=axis - 1))
        if case != "prefix and window":  # two runs of full blocks there: one is masked
            np.testing.assert_array_equal(
                [full for _, full in counts], (whole & some)[0].sum(axis=axis - 1)
            )
