"""Attention on XLA equals a float64 NumPy softmax, its gradients too, and never reads
what is masked."""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels import attention as kernel
from pallas_kernels.attention import xla
from pallas_kernels.attention.params import AttentionOperands, AttentionOptions
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import PLACES, Case, cases, check, compiled
from tests.pallas_kernels.reference import operands

check_xla = partial(
    check,
    partial(kernel.attention_forward, backend="xla"),
    partial(kernel.attention_backward, backend="xla"),
)


@pytest.mark.heavy
@settings(max_examples=6)
@given(cases(reaches=(None, 0, 3, 150, 500)))
def test_every_kind_equals_the_reference(case):
    check_xla(case)


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


LONG, HALF = (2, 256, 257, 4, 2, 4, 3), (1, 256, 256, 4, 2, 32, 32)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case",
    [
        # Biases: tiles in a row and in a loop; distances within reach and beyond it.
        Case((2, 300, 130, 4, 2, 4, 3), packed=True, reach=5),
        Case(LONG, causal=False, packed=True, reach=1000, place="static"),
        Case(LONG, packed=True, reach=31, place="traced"),
        # In half precision, no less exact than plain attention.
        Case(HALF, "bfloat16", window=20, packed=True, slopes=True, soft_cap=5.0),
        Case(HALF, "bfloat16", causal=False, reach=40),
    ],
)
def test_long_rows_equal_the_reference(case):
    check_xla(case, rounding=0)


@pytest.mark.parametrize(
    ("T", "offsets"), [(3, {}), (3, {"q_offset": 40}), (200, {"k_offset": 70})]
)
def test_tiles_that_see_no_key_leave_the_sink(T, offsets):
    """Those whose window lies past the last key, or that lie before the first one."""
    q, k, v = operands(1, 300, T, 2, 1, 4)
    options = {"window": 2, "sinks": np.array([0.5, -np.inf], np.float32), **offsets}
    results = compiled(kernel.attention_forward)(q, k, v, **options)
    for result, want in zip(
        results, reference.attention(q, k, v, **options), strict=True
    ):
        np.testing.assert_allclose(result, want, atol=3e-6)


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
    """Central differences of the reference's output along random directions, all in
    float64."""
    operands, d_o = case.arrays()
    operands = [x.astype(np.float64) for x in operands]
    options = case.options()
    rng = np.random.default_rng(case.seed)
    step = 1e-5
    learned = [x for x in ("sinks", "biases") if x in options]
    operands += [options.pop(x).astype(np.float64) for x in learned]

    def run(operands, d_o=None):
        learned_terms = dict(zip(learned, operands[3:], strict=True))
        return reference.attention(*operands[:3], d_o=d_o, **learned_terms, **options)

    for i, grad in enumerate(run(operands, d_o=d_o)[2:]):
        toward = rng.standard_normal(grad.shape)

        def at(sign, i=i, toward=toward):
            moved = [
                x + sign * step * toward if i == j else x
                for j, x in enumerate(operands)
            ]
            return np.sum(run(moved)[0] * d_o)

        slope = (at(1) - at(-1)) / (2 * step)
        assert np.vdot(grad, toward) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("place", "dtype"), [("traced", jnp.float32), ("positions", jnp.bfloat16)]
)
def test_jax_differentiates_attention(place, dtype):
    """By q, k, v, sinks and biases, in their own dtypes; what places tokens is a
    constant."""
    case = Case((2, 5, 6, 4, 2, 3, 2), place=place, **ALL | {"prefix": False})
    (q, k, v), d_o = case.arrays()
    options = case.options()
    learned = [options.pop(name).astype(dtype) for name in ("sinks", "biases")]
    operands = [q.astype(dtype), k.astype(dtype), v, *learned]

    def attend(q, k, v, sinks, biases, **options: Unpack[AttentionOptions]):
        return kernel.attention(q, k, v, sinks=sinks, biases=biases, **options)

    def pull(*operands, **options: Unpack[AttentionOptions]):
        *operands, d_o = operands
        o, back = jax.vjp(partial(attend, **options), *operands)
        return o, *back(d_o)

    o, *grads = compiled(pull)(*operands, d_o, **options)
    *wide, sinks, biases = (x.astype(np.float64) for x in operands)
    expected = reference.attention(
        *wide, d_o=d_o, sinks=sinks, biases=biases, **options
    )
    assert [x.dtype for x in grads] == [x.dtype for x in operands]
    bound = 1e-5 if dtype == jnp.float32 else 0.03
    for result, want in zip((o, *grads), (expected[0], *expected[2:]), strict=True):
        np.testing.assert_allclose(
            np.asarray(result, np.float64), want, atol=bound, rtol=bound
        )


def flops(**options: int) -> float:
    q, k, v = (jnp.zeros((1, 2048, 1, 8)) for _ in range(3))
    run = partial(kernel.attention, **options)
    return jax.jit(run).lower(q, k, v).cost_analysis().get("flops", 0.0)


def test_what_the_mask_empties_costs_nothing():
    """Tiles wholly outside a window, or past a static offset's diagonal, are not
    computed."""
    causal = flops()
    assert flops(window=128) < 0.3 * causal
    assert flops(q_offset=500, k_offset=500) == pytest.approx(causal, rel=1e-3)
    assert flops(k_offset=1024) < 0.3 * causal
    assert flops(k_offset=1024, window=99) < 0.6 * flops(window=99)
    for nothing in ({"k_offset": 2048}, {"q_offset": 4096, "window": 9}):
        assert flops(**nothing) < 1e-3 * causal


def test_float64_operands_are_computed_in_float64():
    """So that a whole model can be held against a float64 reference."""
    case = Case((2, 130, 140, 4, 2, 6, 9), dtype="float64", **ALL)
    backward = partial(kernel.attention_backward, backend="xla", dtype=jnp.float64)
    with jax.enable_x64(True):
        check(
            partial(kernel.attention_forward, backend="xla"),
            backward,
            case,
            tolerance=1e-12,
        )


def both_passes(q, k, v, d_o, **options: Unpack[AttentionOptions]):
    o, lse = kernel.attention_forward(q, k, v, **options)
    delta = kernel.compute_row_delta(o, d_o)
    options.pop("sinks", None)
    return o, lse, kernel.attention_backward(q, k, v, lse, delta, d_o, **options)


# Rows and kv heads in a part of 3 rows and 6 kv heads, by the room there is for scores.
@pytest.mark.parametrize(
    ("pairs", "shape", "dtype", "one_by_one"),
    [(6, (1, 6), "bfloat16", True), (3, (1, 3), "float32", False)],
)
def test_parts_of_the_batch_give_what_the_whole_gives(
    monkeypatch, pairs, shape, dtype, one_by_one
):
    """With all that a row or a head has of its own; fp32 gradients of bf16 operands are
    not rounded on the way."""
    B, S, N, K = 3, 5, 12, 6
    features = {
        "prefix": True,
        "packed": True,
        "slopes": True,
        "sinks": True,
        "reach": 3,
    }
    case = Case((B, S, S, N, K, 4, 3), dtype, seed=2, **features)
    (q, k, v), d_o = case.arrays()
    options = case.options()
    if one_by_one:
        options["q_positions"] = np.sort(
            np.random.default_rng(0).integers(0, 9, (B, S)), axis=1
        )

    want = compiled(both_passes)(q, k, v, d_o, **options)
    # One pair's scores: 2 query heads, 5 queries, 5 keys, in fp32.
    monkeypatch.setattr(xla, "SCORE_BYTES", 99 * 4 * 2 * S * S)
    assert xla._choose_partition(AttentionOperands(q, k, v)) is None
    monkeypatch.setattr(xla, "SCORE_BYTES", pairs * 4 * 2 * S * S)
    part = xla._choose_partition(AttentionOperands(q, k, v))
    assert part is not None
    assert (B // part.row_parts, K // part.head_parts) == shape
    got = compiled(both_passes)(q, k, v, d_o, **options)
    assert [x.dtype for x in got[:2] + got[2]] == [x.dtype for x in want[:2] + want[2]]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
