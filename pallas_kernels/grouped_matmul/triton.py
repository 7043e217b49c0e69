"""Grouped products on an NVIDIA GPU, through Triton: a program for each tile of a result."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul.blocks import Blocks
from pallas_kernels.grouped_matmul.xla import sum_type, tiles

# Shared memory holds a few stages of both operands' blocks: 4 × (128 + 128) × 64 bytes × 2.
_BLOCKS = Blocks(rows=128, inner=64, columns=128)
_STAGES, _WARPS = 4, 8


def matmul(
    rows: jax.Array,
    kernels: jax.Array,
    sizes: jax.Array,
    row_scales: jax.Array | None,
    column_scales: jax.Array | None,
    *,
    turned: bool,
    dtype: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``grouped_matmul``. Tiles begin at their group's first row, so that none has two groups;
    the padding is a group more, whose tiles only write zeros."""
    (R, D), F = rows.shape, kernels.shape[1 if turned else 2]
    G = len(sizes)
    tile, inner, columns = _checked(blocks, (R, D, F))
    group, start, count = tiles(jnp.append(sizes, R - sizes.sum(dtype=sizes.dtype)), R, tile)
    scales = [s for s in (row_scales, column_scales) if s is not None]
    sums = sum_type(rows.dtype, kernels.dtype)

    def kernel(group_ref, start_ref, count_ref, row_ref, kernel_ref, *refs):
        refs = list(refs)
        row_scale_ref = None if row_scales is None else refs.pop(0)
        column_scale_ref = None if column_scales is None else refs.pop(0)
        out_ref = refs.pop(0)
        step, n = pl.program_id(1), pl.program_id(0)
        g, begin, length = group_ref[step], start_ref[step], count_ref[step]
        here, there = pl.ds(begin, tile), pl.ds(n * columns, columns)
        own = (jnp.arange(tile) < length)[:, None]
        exists = n * columns + jnp.arange(columns) < F

        def add(i, total):
            part = pl.ds(i * inner, inner)
            contracted = i * inner + jnp.arange(inner) < D
            left = _load(row_ref.at[here, part], own & contracted)
            at = kernel_ref.at[(g, there, part) if turned else (g, part, there)]
            within = (
                exists[:, None] & contracted if turned else contracted[:, None] & exists
            )
            right = _load(at, within)
            return total + _product(left, right.T if turned else right)

        zeros = jnp.zeros((tile, columns), sums)
        parts = jnp.where((g < G) & (length > 0), pl.cdiv(D, inner), 0)
        y = lax.fori_loop(0, parts, add, zeros)
        is_row = g < G
        if row_scale_ref is not None:
            y *= _load(row_scale_ref.at[here], own[:, 0] & is_row)[:, None]
        if column_scale_ref is not None:
            y *= _load(column_scale_ref.at[g, there], exists & is_row)
        plgpu.store(out_ref.at[here, there], y.astype(dtype), mask=own & exists)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, F), dtype),
        grid=(pl.cdiv(F, columns), len(group)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=_cost(R, D, F, rows, kernels),
        interpret=interpret,
        name="grouped_matmul",
    )(group, start, count, rows, kernels, *scales)


def outer(
    rows: jax.Array,
    others: jax.Array,
    sizes: jax.Array,
    *,
    dtype: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``grouped_outer``. A program goes through all rows of its group."""
    (R, D), F = rows.shape, others.shape[1]
    depth, inner, columns = _checked(blocks or Blocks(64, 128, 128), (R, D, F))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    sums = sum_type(rows.dtype, others.dtype)

    def kernel(start_ref, end_ref, row_ref, other_ref, out_ref):
        g, m, n = (pl.program_id(i) for i in range(3))
        start, end = start_ref[g], end_ref[g]
        inside, there = pl.ds(m * inner, inner), pl.ds(n * columns, columns)
        in_d = m * inner + jnp.arange(inner) < D
        in_f = n * columns + jnp.arange(columns) < F

        def add(i, total):
            at = start + i * depth
            own = (at + jnp.arange(depth) < end)[:, None]
            here = pl.ds(at, depth)
            left = _load(row_ref.at[here, inside], own & in_d)
            right = _load(other_ref.at[here, there], own & in_f)
            return total + _product(left.T, right)

        zeros = jnp.zeros((inner, columns), sums)
        y = lax.fori_loop(0, pl.cdiv(end - start, depth), add, zeros)
        mask = in_d[:, None] & in_f
        plgpu.store(out_ref.at[g, inside, there], y.astype(dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(sizes), D, F), dtype),
        grid=(len(sizes), pl.cdiv(D, inner), pl.cdiv(F, columns)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=_cost(R, D, F, rows, others),
        interpret=interpret,
        name="grouped_outer",
    )(ends - sizes, ends, rows, others)


def _checked(blocks: Blocks | None, sizes: tuple[int, int, int]) -> Blocks:
    blocks = blocks or _BLOCKS
    if any(n < 16 or n & (n - 1) for n in blocks):
        raise ValueError(
            f"blocks {tuple(blocks)} for sizes {sizes}: each is a power of two, 16 at least"
        )
    return blocks


def _load(ref: Any, mask: jax.Array) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=0)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    if left.dtype != right.dtype or left.dtype.itemsize == 1 and left.dtype != jnp.int8:
        wide = jnp.float32 if jnp.float32 in (left.dtype, right.dtype) else jnp.bfloat16
        left, right = left.astype(wide), right.astype(wide)
    return jnp.dot(left, right, preferred_element_type=sum_type(left.dtype, right.dtype))


def _cost(R: int, D: int, F: int, *arrays: jax.Array) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * R * D * F,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        transcendentals=0,
    )
