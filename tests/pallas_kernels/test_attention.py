"""attention() equals a float64 NumPy softmax, its gradient too, and never reads what is masked."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention as kernel
from tests.pallas_kernels import reference
from tests.pallas_kernels.reference import operands

# Compiling is most of these tests' time, and twice as fast without optimisation.
QUICK = {"xla_backend_optimization_level": 0}
STATIC = ("causal", "window", "scale")
attention, forward, backward = (
    jax.jit(f, static_argnames=STATIC, compiler_options=QUICK)
    for f in (kernel.attention, kernel.attention_forward, kernel.attention_backward)
)


def exact(q, k, v, **options):
    return reference.attention(q, k, v, **options)[0]


@settings(max_examples=12)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 7, 127, 128, 129, 256, 260]),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 2), (5, 1)]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_self_attention_equals_the_reference(B, S, heads, H, causal, packed, seed):
    q, k, v = operands(B, S, S, *heads, H, seed)
    options = {"causal": causal}
    if packed:
        segments = reference.packed(np.random.default_rng(seed), B, S)
        options["segment_ids"] = (segments, segments)
    found = np.asarray(attention(q, k, v, **options))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact(q, k, v, **options), atol=3e-6)


@settings(max_examples=12)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3, 130, 256]),
    st.sampled_from([1, 5, 131, 200]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.integers(0, 99),
)
def test_queries_anywhere_among_other_keys_equal_the_reference(B, S, T, heads, seed):
    """As in decoding: T ≠ S, and each row's queries at positions of their own."""
    q, k, v = operands(B, S, T, *heads, 4, seed)
    positions = np.random.default_rng(seed).integers(0, T + 3, (B, S)).astype(np.int32)
    found = attention(q, k, v, q_positions=positions)
    np.testing.assert_allclose(found, exact(q, k, v, q_positions=positions), atol=3e-6)


@pytest.mark.parametrize(("S", "T"), [(5, 3), (3, 5), (130, 7), (7, 140), (260, 129)])
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_or_more_keys_than_queries(S, T, causal):
    q, k, v = operands(2, S, T, 4, 2, 3)
    found = attention(q, k, v, causal=causal)
    np.testing.assert_allclose(found, exact(q, k, v, causal=causal), atol=3e-6)


def test_segments_of_queries_and_keys_may_differ():
    q, k, v = operands(2, 4, 6, 2, 1, 3)
    segments = (
        np.array([[1, 1, 2, 0], [5, 3, 3, 4]], np.int32),
        np.array([[1, 2, 2, 0, 1, 0], [3, 3, 3, 0, 0, 5]], np.int32),
    )
    for causal in (True, False):
        found = attention(q, k, v, causal=causal, segment_ids=segments)
        wanted = exact(q, k, v, causal=causal, segment_ids=segments)
        np.testing.assert_allclose(found, wanted, atol=3e-6)


@pytest.mark.parametrize("scale", [0.0, 0.3, 40.0])
def test_scale(scale):
    q, k, v = operands(1, 9, 9, 2, 2, 5)
    found = attention(q, k, v, scale=scale)
    np.testing.assert_allclose(found, exact(q, k, v, scale=scale), atol=2e-5)


def test_scores_too_large_for_exp_give_no_infinities():
    """exp overflows in fp32 above 88; these scores reach thousands."""
    q, k, v = operands(1, 9, 9, 2, 2, 5)
    found = np.asarray(attention(100 * q, 100 * k, v))
    np.testing.assert_allclose(found, exact(100 * q, 100 * k, v), atol=2e-3)


@pytest.mark.parametrize(
    ("S", "heads", "window"), [(9, (4, 2), None), (131, (2, 1), None), (260, (2, 1), 3)]
)
def test_gradients_equal_finite_differences(S, heads, window):
    """Along a random direction of each operand, packed rows and padding included."""
    q, k, v = operands(2, S, S, *heads, 3)
    rng, step = np.random.default_rng(1), 1e-5
    segments = reference.packed(rng, 2, S)
    pull = rng.standard_normal(q.shape)

    @partial(jax.jit, compiler_options=QUICK)
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k, v):
        out = kernel.attention(q, k, v, segment_ids=(segments, segments), window=window)
        return jnp.sum(out * pull.astype(np.float32))

    for i, grad in enumerate(gradient(q, k, v)):
        toward = rng.standard_normal(grad.shape)

        def at(sign, i=i, toward=toward):
            moved = [x.astype(np.float64) for x in (q, k, v)]
            moved[i] = moved[i] + sign * step * toward
            return np.sum(exact(*moved, segment_ids=(segments, segments), window=window) * pull)

        slope = (at(1) - at(-1)) / (2 * step)
        assert np.vdot(grad, toward) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@settings(max_examples=15)
@given(
    st.sampled_from([1, 7, 128, 129, 300]),
    st.sampled_from([1, 2, 5, 127, 128, 130, 400]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_windows_equal_the_reference(S, window, heads, packed, seed):
    q, k, v = operands(2, S, S, *heads, 4, seed)
    options = {"window": window}
    if packed:
        options["segment_ids"] = (reference.packed(np.random.default_rng(seed), 2, S),) * 2
    found = attention(q, k, v, **options)
    np.testing.assert_allclose(found, exact(q, k, v, **options), atol=3e-6)


@pytest.mark.parametrize("T", [3, 200])
def test_queries_whose_window_lies_past_the_last_key_give_zeros(T):
    q, k, v = operands(1, 300, T, 2, 1, 4)
    found = attention(q, k, v, window=2)
    np.testing.assert_allclose(found, exact(q, k, v, window=2), atol=3e-6)
    np.testing.assert_array_equal(found[:, T + 1 :], 0)


def test_a_window_over_positions_anywhere():
    """As in decoding, and as keys of a block that stands elsewhere in its sequence."""
    q, k, v = operands(2, 5, 140, 4, 2, 3)
    rng = np.random.default_rng(0)
    at = {
        "q_positions": rng.integers(0, 150, (2, 5)).astype(np.int32),
        "k_positions": rng.permuted(np.tile(np.arange(140, dtype=np.int32), (2, 1)), axis=1),
    }
    for options in ({}, {"window": 1}, {"window": 40}, {"k_positions": None, "window": 3}):
        options = {**at, **options}
        found = attention(q, k, v, **options)
        np.testing.assert_allclose(found, exact(q, k, v, **options), atol=3e-6)
    shared = {"q_positions": at["q_positions"][:1], "k_positions": at["k_positions"][:1]}
    found = attention(q, k, v, **shared, window=9)
    np.testing.assert_allclose(found, exact(q, k, v, **shared, window=9), atol=3e-6)


def test_a_window_saves_its_work():
    """Tiles wholly outside it are not computed: the cost grows with the window."""
    q, k, v = operands(1, 2048, 2048, 1, 1, 8)

    def flops(window):
        return attention.lower(q, k, v, window=window).compile().cost_analysis()["flops"]

    assert flops(128) < 0.3 * flops(None)


@pytest.mark.parametrize("S", [6, 133])
def test_queries_with_no_key_give_zeros_and_no_gradient(S):
    q, k, v = operands(2, S, S, 2, 1, 4)
    segments = np.ones((2, S), np.int32)
    segments[0, S - 2 :] = 0
    segments[1] = 0

    @partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v):
        attend = partial(kernel.attention, segment_ids=(segments, segments))
        y, pullback = jax.vjp(attend, q, k, v)
        return y, pullback(jnp.ones_like(y))

    y, grads = run(q, k, v)
    np.testing.assert_array_equal(np.asarray(y)[segments == 0], 0)
    for grad in grads:
        grad = np.asarray(grad)
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[segments == 0], 0)
    assert np.abs(np.asarray(y)[segments == 1]).min() > 0


BLOCKS = {
    "causal": ({}, False),
    "window, packed": ({"window": 9}, True),
    "packed, not causal": ({"causal": False}, True),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize(("S", "heads"), [(37, (4, 2)), (256, (2, 1))])
def test_blocks_of_keys_merge_to_the_whole_and_share_out_its_gradients(case, S, heads):
    """Keys in three blocks, met out of order: outputs merge, each block yields its own dK, dV."""
    options, is_packed = BLOCKS[case]
    cuts = (0, 11, 12, S)
    q, k, v = operands(2, S, S, *heads, 3)
    rng = np.random.default_rng(5)
    d_o = rng.standard_normal(q.shape).astype(np.float32)
    segments = reference.packed(rng, 2, S)
    at = np.arange(S, dtype=np.int32)[None]

    def block(i):
        rows = slice(cuts[i], cuts[i + 1])
        mask = {"q_positions": at, "k_positions": at[:, rows], **options}
        if is_packed:
            mask["segment_ids"] = (segments, segments[:, rows])
        return (q, k[:, rows], v[:, rows]), mask

    parts = []
    for i in (2, 0, 1):
        keys, mask = block(i)
        parts.append(forward(*keys, **mask))
        for found, wanted in zip(parts[-1], reference.attention(*keys, **mask), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted, atol=3e-6)
    o, lse = reduce(kernel.merge, parts)
    whole = {**options, "segment_ids": (segments, segments) if is_packed else None}
    wanted = reference.attention(q, k, v, d_o=d_o, **whole)
    np.testing.assert_allclose(o, wanted[0], atol=3e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=3e-6)

    delta = kernel.row_delta(o, d_o)
    d_q = 0
    for i in range(3):
        keys, mask = block(i)
        rows = slice(cuts[i], cuts[i + 1])
        term, d_k, d_v = backward(*keys, lse, delta, d_o, **mask)
        d_q += term
        np.testing.assert_allclose(d_k, wanted[3][:, rows], atol=1e-5)
        np.testing.assert_allclose(d_v, wanted[4][:, rows], atol=1e-5)
    np.testing.assert_allclose(d_q, wanted[2], atol=1e-5)


def test_half_precision_blocks_leave_fp32_results():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in operands(1, 5, 5, 2, 1, 4))
    o, lse = forward(q, k, v)
    assert (o.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    o, lse = kernel.attention_forward(q, k, v, dtype=jnp.float32)
    grads = backward(q, k, v, lse, kernel.row_delta(o, o), o.astype(q.dtype))
    assert {x.dtype for x in (o, *grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("window", "causal"), [(0, True), (-1, True), (3, False)])
def test_windows_that_look_nowhere_are_refused(window, causal):
    q, k, v = operands(1, 3, 3, 1, 1, 2)
    with pytest.raises(ValueError, match="windows look back"):
        kernel.attention(q, k, v, window=window, causal=causal)


@pytest.mark.parametrize("garbage", [1e4, -1e4, 3e38])
def test_masked_keys_and_values_never_leak(garbage):
    """Any finite value may lie in a masked slot: the future, another document, padding."""
    q, k, v = operands(1, 3, 8, 2, 1, 4)
    positions = np.array([[2, 3, 4]], np.int32)
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, 5:], dirty_v[:, 5:] = garbage, -garbage
    clean = attention(q, k, v, q_positions=positions)
    dirty = attention(q, dirty_k, dirty_v, q_positions=positions)
    np.testing.assert_array_equal(dirty, clean)

    q, k, v = operands(1, 8, 8, 2, 1, 4)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[:, [0, 1, 2, 6, 7]], dirty_v[:, [0, 1, 2, 6, 7]] = garbage, -garbage
    for causal in (True, False):
        options = {"causal": causal, "segment_ids": (segments, segments)}
        clean = np.asarray(attention(q, k, v, **options))
        dirty = np.asarray(attention(q, dirty_k, dirty_v, **options))
        np.testing.assert_array_equal(dirty[:, 3:6], clean[:, 3:6])
        np.testing.assert_array_equal(dirty[:, 6:], 0)


def test_bf16_operands_keep_an_fp32_softmax():
    """A thousand equal scores: a bf16 sum of exponentials would stop growing at 256."""
    T = 1000
    q, k = np.zeros((1, 1, 1, 4)), np.zeros((1, T, 1, 4))
    v = np.ones((1, T, 1, 4))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    found = attention(q, k, v, causal=False)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1, atol=0.01)


def refused(q, k, v) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kernel.attention(*(np.zeros(shape, np.float32) for shape in (q, k, v)))
    return str(error.value)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 3, 2, 4), (1, 3, 2, 4), (1, 5, 2, 4)),
        ((2, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4)),
        ((1, 3, 2, 6), (1, 3, 2, 4), (1, 3, 2, 4)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(q, k, v):
    assert refused(q, k, v) == f"q {q}, k {k} and v {v} do not belong together"


def test_query_heads_must_divide_over_kv_heads():
    kv = (1, 3, 2, 4)
    assert refused((1, 3, 3, 4), kv, kv) == "3 query heads do not divide over 2 kv heads"
