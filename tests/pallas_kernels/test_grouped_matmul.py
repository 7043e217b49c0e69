"""Grouped products against float64, with NaN wherever nothing may be read."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grouped_matmul as api
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_matmul import (
    blocks,
    grouped_matmul,
    grouped_outer_product,
    tpu,
    triton,
    xla,
)
from pallas_kernels.grouped_matmul.blocks import GroupedBlocks
from pallas_kernels.grouped_matmul.tpu import plan_group_visits

POISONED = pltpu.InterpretParams(uninitialized_memory="nan")
COMPILED = api.import_module


def interpreted(of_matmul=None, of_outer=None):
    """The modules that ``api`` imports, with these blocks, in the interpreter."""
    modules = {f"{api.__name__}.xla": xla}
    for module, options in (
        (tpu, {"interpret": POISONED}),
        (triton, {"interpret": True}),
    ):
        modules[module.__name__] = SimpleNamespace(
            matmul=partial(module.matmul, blocks=of_matmul, **options),
            outer=partial(module.outer, blocks=of_outer, **options),
        )
    return modules


# (backend, rows, D, F, blocks of the matmul, of the outer product): tiles that end
# inside groups, D in parts, a last block of columns that is not full.
CASES = {
    "tpu": ("tpu", 203, 24, 40, GroupedBlocks(64, 24, 40), GroupedBlocks(64, 24, 40)),
    "tpu, parts": (
        "tpu",
        210,
        256,
        200,
        GroupedBlocks(96, 128, 128),
        GroupedBlocks(160, 128, 128),
    ),
    "tpu, by rule": ("tpu", 77, 130, 9, None, None),
    "gpu": ("gpu", 203, 24, 40, GroupedBlocks(32, 16, 32), GroupedBlocks(32, 16, 32)),
    "cpu": ("cpu", 203, 24, 40, None, None),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(api, "import_module", interpreted().get)


def of_group(rows, sizes):
    """The rows of each group."""
    ends = np.cumsum(sizes)
    return [rows[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def matmul_reference(rows, kernels, sizes):
    """In float64, rows × kernel of one group after the other, zeros behind them."""
    out = np.zeros((len(rows), kernels.shape[2]))
    parts = zip(of_group(rows, sizes), kernels, strict=True)
    products = [
        part.astype(np.float64) @ kernel.astype(np.float64) for part, kernel in parts
    ]
    out[: sum(sizes)] = np.concatenate(products)
    return out


def outer_reference(rows, others, sizes):
    pairs = zip(of_group(rows, sizes), of_group(others, sizes), strict=True)
    return np.stack([a.astype(np.float64).T @ b.astype(np.float64) for a, b in pairs])


def operands(R, D, F, sizes, seed=0):
    """rows [R, D], others [R, F], NaN behind the groups', and kernels [G, D, F]."""
    rng = np.random.default_rng(seed)
    rows, others = (rng.standard_normal((R, n)).astype(np.float32) for n in (D, F))
    kernels = rng.standard_normal((len(sizes), D, F)).astype(np.float32)
    rows[sum(sizes) :] = others[sum(sizes) :] = np.nan
    return rows, others, kernels


def near(got, want, tolerance=2e-6):
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale
    )


@partial(jax.jit, static_argnames=("backend", "of_matmul", "of_outer"))
def products(rows, others, kernels, sizes, backend, of_matmul, of_outer):
    transposed = kernels.swapaxes(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "import_module", interpreted(of_matmul, of_outer).get)
        return (
            grouped_matmul(rows, kernels, sizes, backend=backend),
            grouped_matmul(
                rows, transposed, sizes, transpose_kernels=True, backend=backend
            ),
            grouped_outer_product(rows, others, sizes, backend=backend),
        )


# Shares of the rows before which each group ends: one giant; padding alone; ends within
# tiles.
CUTS = [
    (0, 0, 1, 1, 1),
    (0, 0, 0, 0, 0),
    (0, 0.4, 0.41, 0.9, 0.9),
    (0.13, 0.2, 0.57, 0.93, 1),
]


@pytest.mark.heavy
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_its_group_and_no_other(case, cuts):
    backend, R, D, F, *sizes_of_blocks = CASES[case]
    sizes = np.diff(np.round(np.array(cuts) * R), prepend=0).astype(np.int32)
    rows, others, kernels = operands(R, D, F, sizes)
    dot, transposed, outer = products(
        rows, others, kernels, sizes, backend, *sizes_of_blocks
    )
    want = matmul_reference(rows, kernels, sizes)
    near(dot, want)
    near(transposed, want)
    near(outer, outer_reference(rows, others, sizes))


@pytest.mark.parametrize("case", ["tpu", "gpu", "cpu"])
def test_what_is_not_finite_stays_in_its_group(case):
    backend, R, D, F, *sizes_of_blocks = CASES[case]
    sizes = np.array([40, 21, 50, 0, 60], np.int32)
    rows, others, kernels = operands(R, D, F, sizes)
    bad = slice(61, 111)
    rows[bad], others[bad], kernels[2] = np.nan, np.inf, np.nan
    dot, _, outer = products(rows, others, kernels, sizes, backend, *sizes_of_blocks)
    assert np.isnan(dot[bad]).all()
    assert np.isnan(outer[2]).all()
    assert np.isfinite(np.delete(dot, np.r_[bad], axis=0)).all()
    assert np.isfinite(np.delete(outer, 2, axis=0)).all()


@pytest.mark.parametrize(
    ("where", "left", "right", "transposed"),
    [
        ("v4", "int8", "int8", True),
        ("v6e", "int8", "int8", False),
        ("gpu", "int8", "int8", True),
        ("cpu", "int8", "int8", True),
        ("v5e", "float8_e4m3fn", "float8_e4m3fn", False),
        ("v5e", "bfloat16", "bfloat16", False),
        ("7x", "float8_e5m2", "float8_e4m3fn", False),
        ("7x", "bfloat16", "int8", False),
        ("gpu", "float8_e4m3fn", "float8_e4m3fn", False),
        ("gpu", "bfloat16", "int8", False),
        ("cpu", "float8_e5m2", "float8_e4m3fn", False),
    ],
)
def test_operands_of_few_bits(where, left, right, transposed, monkeypatch):
    """int8 is exact in int32, over rows so long that fp32 would round; scales come
    behind."""
    backend = _backend(where, monkeypatch)
    exact = left == "int8"
    sizes = np.array([21, 0, 10], np.int32)
    rows, others, kernels = operands(40, 1200 if exact else 40, 24, sizes)
    if right == "int8":
        rng = np.random.default_rng(1)
        others, kernels = (rng.integers(120, 128, x.shape) for x in (others, kernels))
        rows = rng.integers(120, 128, rows.shape) if exact else rows
    rows = rows.astype(left)
    others = others.astype(right)
    kernels = kernels.astype(right)
    rng = np.random.default_rng(2)
    scales = {}
    if rows.dtype.itemsize == 1:
        scales["row_scales"] = rng.uniform(0.5, 2, 40).astype(np.float32)
        scales["row_scales"][sizes.sum() :] = np.nan
    if kernels.dtype.itemsize == 1:
        scales["column_scales"] = rng.uniform(0.5, 2, (3, 24)).astype(np.float32)
    options = {"backend": backend} | ({} if exact else {"dtype": jnp.float32})

    @jax.jit
    def run(rows, kernels, others, sizes, scales):
        operand = kernels.swapaxes(1, 2) if transposed else kernels
        dot = partial(
            grouped_matmul,
            rows,
            operand,
            sizes,
            transpose_kernels=transposed,
            **options,
        )
        plain = dot() if exact else None
        return (
            plain,
            dot(**scales),
            grouped_outer_product(rows, others, sizes, **options),
        )

    dot, scaled, outer = run(rows, kernels, others, sizes, scales)
    want = matmul_reference(rows, kernels, sizes)
    tolerance = 0 if exact else 2e-6
    if exact:
        assert dot.dtype == jnp.int32
        near(dot, want, tolerance)
    else:
        assert scaled.dtype == jnp.float32
    near(outer, outer_reference(rows, others, sizes), tolerance)
    used = sizes.sum()
    want[:used] *= scales.get("row_scales", np.ones(40))[:used, None]
    want[:used] *= np.repeat(
        scales.get("column_scales", np.ones((3, 24))), sizes, axis=0
    )
    near(scaled, want, 2**-8 if exact else 2e-6)


def _backend(where, monkeypatch):
    if where in CHIPS:
        monkeypatch.setattr(tpu, "get_chip", lambda: CHIPS[where])
        return "tpu"
    return where


@pytest.mark.parametrize(
    ("backend", "transposed"),
    [("tpu", False), ("gpu", True), ("cpu", False), ("cpu", True), (None, True)],
)
def test_gradients_are_those_of_the_definition(backend, transposed, monkeypatch):
    if backend is None:  # all are traced, that of the platform is run
        monkeypatch.setattr(api, "import_module", COMPILED)
    sizes = np.array([12, 0, 25, 3], np.int32)
    used = sizes.sum()
    rows, cotangent, kernels = operands(50, 24, 16, sizes)
    operand = kernels.swapaxes(1, 2) if transposed else kernels

    @jax.jit
    def gradients(rows, arguments, cotangent, sizes):
        function = partial(
            grouped_matmul,
            group_sizes=sizes,
            transpose_kernels=transposed,
            backend=backend,
        )
        return jax.vjp(function, rows, arguments)[1](cotangent)

    d_rows, d_kernels = gradients(rows, operand, cotangent, sizes)
    d_kernels = d_kernels.swapaxes(1, 2) if transposed else d_kernels
    near(d_rows, matmul_reference(cotangent, kernels.swapaxes(1, 2), sizes))
    near(d_kernels, outer_reference(rows, cotangent, sizes))
    assert (np.asarray(d_rows)[used:] == 0).all()
    assert (np.asarray(d_kernels)[1] == 0).all()


def test_each_product_is_the_others_gradient_to_the_second_order():
    sizes = np.array([2, 0, 3], np.int32)
    rows, others, kernels = (np.nan_to_num(x) for x in operands(6, 3, 4, sizes))
    d_rows, d_others, d_kernels = (
        np.nan_to_num(x) for x in operands(6, 3, 4, sizes, seed=1)
    )
    matmul, outer = (
        partial(f, sizes=sizes) for f in (matmul_reference, outer_reference)
    )
    back = kernels.swapaxes(1, 2)
    d_back = d_kernels.swapaxes(1, 2)

    def check(function, arguments, toward, first, second):
        """Gradients, and those of what they are along ``toward``, which has all
        arguments."""

        @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
        def run(left, right, cotangent):
            grads = jax.vjp(lambda *x: function(*x, sizes, backend="cpu"), left, right)[
                1
            ](cotangent)
            return sum(map(jnp.vdot, grads, toward)), grads

        y, grads = jax.jit(run)(*arguments)
        for got, want in zip((*grads, *y), (*first, *second), strict=True):
            near(got, want)

    check(
        *(grouped_matmul, (rows, kernels, others), (d_rows, d_kernels)),
        (matmul(others, back), outer(rows, others)),
        (
            matmul(others, d_back),
            outer(d_rows, others),
            matmul(d_rows, kernels) + matmul(rows, d_kernels),
        ),
    )
    check(
        *(grouped_outer_product, (rows, others, kernels), (d_rows, d_others)),
        (matmul(others, back), matmul(rows, kernels)),
        (
            matmul(d_others, back),
            matmul(d_rows, kernels),
            outer(d_rows, others) + outer(rows, d_others),
        ),
    )


@pytest.mark.parametrize("padding", [False, True])
@given(cuts=st.lists(st.integers(0, 330), min_size=5, max_size=5), whole=st.booleans())
def test_visits_find_every_row_once_and_no_more(padding, cuts, whole):
    num_rows, tile = 330, 32
    cuts = [*sorted(cuts[:4]), num_rows if whole else max(cuts)]
    sizes = np.diff(np.sort(cuts), prepend=0).astype(np.int32)
    visits, count = _visits(sizes, num_rows, tile, padding=padding)
    visits = jax.tree.map(np.asarray, visits)
    count = int(count)
    seen = []
    for tile_number, read, group, begin, end, behind in zip(
        *(x[:count] for x in (visits.out_tile, visits.tile, *visits[2:])), strict=True
    ):
        assert behind or read == tile_number
        seen += [
            (tile_number * tile + i, 5 if behind else group) for i in range(begin, end)
        ]
    lengths = (*sizes, num_rows - sizes.sum() if padding else 0)
    assert seen == list(enumerate(np.repeat(np.arange(6), lengths)))
    # One for each tile, and for each group that begins inside one.
    assert count <= -(-num_rows // tile) + len(sizes)
    assert padding or set(visits.group[:count]) == set(range(len(sizes)))


_visits = jax.jit(
    plan_group_visits, static_argnums=(1, 2), static_argnames=("padding",)
)


@settings(max_examples=100)
@given(
    inner=st.integers(1, 250).map(lambda n: 128 * n) | st.integers(1, 3000),
    columns=st.integers(1, 250).map(lambda n: 128 * n) | st.integers(1, 3000),
    rows=st.integers(1, 100_000),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32, jnp.int8]),
    chip=st.sampled_from(list(CHIPS.values())),
)
@example(inner=2432, columns=256, rows=385, dtype=jnp.float32, chip=CHIPS["v4"])
@example(inner=7040, columns=128, rows=100_000, dtype=jnp.float32, chip=CHIPS["v4"])
def test_blocks_by_rule_fit_every_chip(inner, columns, rows, dtype, chip):
    out = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    sizes = blocks.GroupedOperands(rows, inner, columns, dtype, dtype, out)
    chosen = blocks.choose_matmul_blocks(sizes, chip)
    assert blocks.matmul_vmem_bytes(chosen, sizes, chip) <= chip.vmem_bytes
    assert_cuts(chosen, sizes)
    assert inner % chosen.inner == 0
    assert chosen.columns % blocks.column_part_size(chosen, sizes, chip) == 0
    chosen = blocks.choose_outer_blocks(sizes, chip)
    assert blocks.outer_vmem_bytes(chosen, sizes) <= chip.vmem_bytes
    assert_cuts(chosen, sizes)
    parts = blocks.outer_part_shape(chosen, sizes)
    assert chosen.inner % parts[0] == chosen.columns % parts[1] == 0


def assert_cuts(chosen, sizes):
    """Rows by 32, as 8-bit numbers come; other dimensions whole, or in multiples of
    128."""
    assert chosen.rows > 0
    assert chosen.rows % 32 == 0
    assert chosen.inner == sizes.inner or chosen.inner % 128 == 0
    assert chosen.columns == sizes.columns or chosen.columns % 128 == 0


def test_a_gradient_through_8_bits_is_refused():
    rows, kernels = jnp.ones((8, 16), jnp.int8), jnp.ones((2, 16, 8), jnp.int8)
    sizes = jnp.array([3, 4], jnp.int32)

    def loss(scales):
        return grouped_matmul(rows, kernels, sizes, row_scales=scales).sum()

    with pytest.raises(ValueError, match=r"no gradient of products of int8 \(8, 16\)"):
        jax.grad(loss)(jnp.ones(8))


@pytest.mark.parametrize(
    ("rows", "kernels", "options", "message"),
    [
        ((64, 256), (4, 384, 256), {}, r"rows \(64, 256\), kernels \(4, 384, 256\)"),
        ((64, 256), (4, 256, 384), {"dtype": jnp.int8}, "no result in int8"),
        (
            (64, 256),
            (4, 256, 384),
            {"row_scales": np.ones(64)},
            r"scales \(64,\) of bfloat16",
        ),
        (
            (64, 256),
            (4, 256, 384),
            {"backend": "cuda"},
            "'cuda' is none of tpu, gpu, cpu",
        ),
        (
            (64, 9**5),
            (4, 9**5, 8),
            {"backend": "tpu"},
            r"\d+ bytes of VMEM, .* 16777216",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(rows, kernels, options, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(
            jnp.ones(rows, jnp.bfloat16),
            jnp.ones(kernels, jnp.bfloat16),
            jnp.ones(4, int),
            **options,
        )
