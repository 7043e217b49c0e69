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


@settings(max_examples=12)
@given(cases(reaches=(None, 0, 3, 150, 500)))
def test_every_kind_equals_the_reference(case):
    check_xla(case)


@pytest.mark.parametrize(
    ("S", "T", "reach", "place", "causal"),
    [
        (300, 130, 5, "default", True),
        (256, 200, 1000, "static", False),
        (256, 257, 31, "traced", True),
        (129, 300, 0, "default", False),
        (130, 131, 7, "positions", True),
    ],
)
def test_biases_by_distance(S, T, reach, place, causal):
    """Tiles in a row and in a loop; distances within reach and beyond it."""
    check_xla(Case((2, S, T, 4, 2, 4, 3), causal=causal, packed=True, reach=reach, place=place))


ALL = {
    "window": 50,
    "prefix": True,
    "packed": True,
    "soft_cap": 2.0,
    "slopes": True,
    "sinks": True,
    "reach": 20,
}


@pytest.mark.parametrize("place", PLACES)
def test_all_features_at_once(place):
    check_xla(Case((2, 130, 140, 4, 2, 6, 9), place=place, **ALL))


@pytest.mark.parametrize(
    "features",
    [
        {"window": 20, "packed": True},
        {"slopes": True, "soft_cap": 5.0},
        {"causal": False, "reach": 40},
    ],
)
def test_half_precision_costs_no_more_than_in_plain_attention(features):
    check_xla(Case((1, 256, 256, 4, 2, 32, 32), "bfloat16", **features), rounding=0)


@settings(max_examples=15)
@given(
    cases(
        lengths=(1, 2, 5),
        heads=((2, 1),),
        head_sizes=((2, 3),),
        dtypes=("float32",),
        reaches=(None, 0, 2, 7),
    )
)
def test_the_reference_gradients_are_finite_differences(case):
    """Central differences of the reference's output along random directions, all in float64."""
    operands, d_o = case.arrays()
    operands, options = [x.astype(np.float64) for x in operands], case.options()
    rng, step = np.random.default_rng(case.seed), 1e-5
    learned = [x for x in ("sinks", "biases") if x in options]
    operands += [options.pop(x).astype(np.float64) for x in learned]

    def run(operands, **more):
        own = dict(zip(learned, operands[3:], strict=True))
        return reference.attention(*operands[:3], **own, **options, **more)

    for i, grad in enumerate(run(operands, d_o=d_o)[2:]):
        toward = rng.standard_normal(grad.shape)

        def at(sign, i=i, toward=toward):
            moved = [x + sign * step * toward if i == j else x for j, x in enumerate(operands)]
            return np.sum(run(moved)[0] * d_o)

        slope = (at(1) - at(-1)) / (2 * step)
        assert np.vdot(grad, toward) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("place", ["traced", "positions"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jax_differentiates_attention(place, dtype):
    """By q, k, v, sinks and biases, in their own dtypes; what places tokens is a constant."""
    case = Case((2, 5, 6, 4, 2, 3, 2), place=place, **ALL | {"prefix": False})
    (q, k, v), d_o = case.arrays()
    options = case.options()
    learned = [options.pop(name).astype(dtype) for name in ("sinks", "biases")]
    operands = [q.astype(dtype), k.astype(dtype), v, *learned]

    def attend(q, k, v, sinks, biases, **options):
        return kernel.attention(q, k, v, sinks=sinks, biases=biases, **options)

    def pull(*operands, **options):
        *operands, d_o = operands
        o, back = jax.vjp(partial(attend, **options), *operands)
        return o, *back(d_o)

    o, *grads = compiled(pull)(*operands, d_o, **options)
    *wide, sinks, biases = (x.astype(np.float64) for x in operands)
    wanted = reference.attention(*wide, d_o=d_o, sinks=sinks, biases=biases, **options)
    assert [x.dtype for x in grads] == [x.dtype for x in operands]
    bound = 1e-5 if dtype == jnp.float32 else 0.03
    for found, want in zip((o, *grads), (wanted[0], *wanted[2:]), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=bound, rtol=bound)


def test_scores_too_large_for_exp_give_no_infinities():
    """exp overflows in fp32 above 88; these scores reach thousands."""
    q, k, v = operands(1, 9, 9, 2, 2, 5)
    found = np.asarray(attention(100 * q, 100 * k, v))
    np.testing.assert_allclose(found, exact(100 * q, 100 * k, v), atol=2e-3)


def test_a_sink_of_minus_infinity_is_none():
    """For queries with keys and without, gradients too."""
    q, k, v = operands(1, 4, 4, 2, 1, 3)
    segments = np.array([[1, 1, 0, 0]], np.int32)
    options = {"segment_ids": (segments, segments)}
    sinks = np.array([-np.inf, 1], np.float32)

    def pull(q, k, v, sinks, d_o, **options):
        attend = partial(kernel.attention, **options)
        o, back = jax.vjp(lambda *x: attend(*x[:3], sinks=x[3]), q, k, v, sinks)
        return o, *back(d_o)

    o, *grads = compiled(pull)(q, k, v, sinks, np.ones_like(q), **options)
    wanted = reference.attention(q, k, v, d_o=np.ones_like(q), sinks=sinks, **options)
    for found, want in zip((o, *grads), (wanted[0], *wanted[2:]), strict=True):
        np.testing.assert_allclose(found, want, atol=3e-6)


@pytest.mark.parametrize(
    ("T", "offsets"), [(3, {}), (3, {"q_offset": 40}), (200, {"k_offset": 70})]
)
def test_tiles_that_see_no_key_leave_the_sink(T, offsets):
    """Those whose window lies past the last key, or that lie before the first one."""
    q, k, v = operands(1, 300, T, 2, 1, 4)
    for sinks in (None, np.array([0.5, -2], np.float32)):
        options = {"window": 2, "sinks": sinks, **offsets}
        for found, want in zip(
            forward(q, k, v, **options), reference.attention(q, k, v, **options), strict=True
        ):
            np.testing.assert_allclose(found, want, atol=3e-6)


def flops(**options) -> float:
    q, k, v = (jnp.zeros((1, 2048, 1, 8)) for _ in range(3))
    run = partial(kernel.attention, **options)
    return jax.jit(run).lower(q, k, v).cost_analysis().get("flops", 0.0)


def test_what_the_mask_empties_costs_nothing():
    """Tiles wholly outside a window, or past a static offset's diagonal, are not computed."""
    causal = flops()
    assert flops(window=128) < 0.3 * causal
    assert flops(q_offset=500, k_offset=500) == pytest.approx(causal, rel=1e-3)
    assert flops(k_offset=1024) < 0.3 * causal
    assert flops(k_offset=1024, window=99) < 0.6 * flops(window=99)
    for nothing in ({"k_offset": 2048}, {"q_offset": 4096, "window": 9}):
        assert flops(**nothing) < 1e-3 * causal


def test_biases_take_a_tile_of_memory():
    """Forward and back, what they add is far less than one matrix of scores."""
    S = 4096
    q = jax.ShapeDtypeStruct((1, S, 1, 8), jnp.float32)
    biases = jax.ShapeDtypeStruct((1, 2 * S + 1), jnp.float32)

    def temporaries(biases=None):
        def pull(q, biases):
            attend = partial(kernel.attention, causal=False)
            o, back = jax.vjp(lambda q, b: attend(q, q, q, biases=b), q, biases)
            return back(o)

        return jax.jit(pull).lower(q, biases).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(biases) - temporaries() < 0.1 * 4 * S * S


BLOCKS = {
    "causal, sinks": ({"sinks": np.array([0.3, 1, -1, 2], np.float32)}, False),
    "window, packed, capped": ({"window": 9, "soft_cap": 2.0}, True),
    "packed, not causal": ({"causal": False}, True),
    "biases": ({"biases": np.linspace(-3, 3, 4 * 27, dtype=np.float32).reshape(4, 27)}, True),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("S", [37])
def test_blocks_of_keys_merge_to_the_whole_and_share_out_its_gradients(case, S):
    """Keys in three blocks, met out of order: outputs merge, each block yields its own dK, dV.
    One block has the sinks."""
    options, is_packed = BLOCKS[case]
    cuts = (0, 11, 12, S)
    q, k, v = operands(2, S, S, 4, 2, 3)
    rng = np.random.default_rng(5)
    d_o = rng.standard_normal(q.shape).astype(np.float32)
    segments = reference.packed(rng, 2, S)

    def block(i):
        rows = slice(cuts[i], cuts[i + 1])
        mask = {**options, "k_offset": np.array(cuts[i], np.int32)}
        if i != 2:
            mask.pop("sinks", None)
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
    o, lse = reduce(kernel.merge_attention, parts)
    whole = {**options, "segment_ids": (segments, segments) if is_packed else None}
    wanted = reference.attention(q, k, v, d_o=d_o, **whole)
    np.testing.assert_allclose(o, wanted[0], atol=3e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=3e-6)

    delta = kernel.compute_row_delta(o, d_o)
    d_q = d_biases = 0
    for i in range(3):
        keys, mask = block(i)
        rows = slice(cuts[i], cuts[i + 1])
        term, d_k, d_v, *term_of_biases = backward(*keys, lse, delta, d_o, **mask)
        d_q += term
        d_biases += sum(term_of_biases)
        np.testing.assert_allclose(d_k, wanted[3][:, rows], atol=1e-5)
        np.testing.assert_allclose(d_v, wanted[4][:, rows], atol=1e-5)
    np.testing.assert_allclose(d_q, wanted[2], atol=1e-5)
    if "biases" in options:
        np.testing.assert_allclose(d_biases, wanted[5], atol=3e-5)
    if "sinks" in options:
        d_sinks = kernel.sink_gradient(options["sinks"], lse, delta)
        np.testing.assert_allclose(d_sinks, wanted[5], atol=3e-5)


@pytest.mark.parametrize(("garbage", "soft_cap"), [(-1e4, None), (3e38, 3.0)])
def test_masked_keys_and_values_never_leak(garbage, soft_cap):
    """Whatever is finite may lie there; its products overflow, in the backward pass too."""
    q, k, v = operands(1, 6, 8, 2, 1, 4)
    segments = np.array([[0, 0, 0, 2, 2, 2]]), np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    unseen = segments[1] != 2
    dirty_k, dirty_v = k.copy(), v.copy()
    dirty_k[unseen], dirty_v[unseen] = garbage, -garbage

    def pull(q, k, v, d_o, **options):
        o, back = jax.vjp(partial(kernel.attention, **options), q, k, v)
        return o, *back(d_o)

    for causal in (True, False):
        options = {"causal": causal, "soft_cap": soft_cap, "segment_ids": segments}
        clean = compiled(pull)(q, k, v, q, **options)
        dirty = compiled(pull)(q, dirty_k, dirty_v, q, **options)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)
        assert all(np.isfinite(x).all() for x in clean)


def test_bf16_operands_keep_an_fp32_softmax():
    """A thousand equal scores: a bf16 sum of exponentials would stop growing at 256."""
    T = 1000
    q, k = np.zeros((1, 1, 1, 4)), np.zeros((1, T, 1, 4))
    v = np.ones((1, T, 1, 4))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    found = attention(q, k, v, causal=False)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), 1, atol=0.01)


def test_float64_operands_are_computed_in_float64():
    """So that a whole model can be held against a float64 reference."""
    case = Case((2, 130, 140, 4, 2, 6, 9), dtype="float64", **ALL)
    backward = partial(kernel.attention_backward, backend="xla", dtype=jnp.float64)
    with jax.enable_x64(True):
        check(partial(kernel.attention_forward, backend="xla"), backward, case, tolerance=1e-12)
