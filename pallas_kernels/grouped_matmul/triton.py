"""Grouped products on an NVIDIA GPU, through Triton: a program for each tile of a
result."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chips import get_mesh_device
from pallas_kernels.grouped_matmul.blocks import GroupedBlocks
from pallas_kernels.grouped_matmul.xla import accumulation_dtype, plan_group_tiles
from pallas_kernels.kernel_types import Ref

# Programs that run beside each other share rows and kernels: so many columns of tiles
# at a time.
_BAND = 8
_STAGES = 4
_WARPS = 8
# Cards that read float8_e4m3fn; for others XLA widens it first.
_FLOAT8_CARDS = ("H100", "H200", "GH200", "B200", "GB200", "B300", "L4")


def matmul(
    rows: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    row_scales: jax.Array | None = None,
    column_scales: jax.Array | None = None,
    *,
    transposed: bool,
    dtype: DTypeLike,
    blocks: GroupedBlocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``grouped_matmul``. Tiles begin at their group's first row, so that none has
    two groups; the padding is a group more, whose tiles only write zeros."""
    rows = _make_readable(rows)
    kernels = _make_readable(kernels)
    R, D = rows.shape
    F = kernels.shape[1 if transposed else 2]
    G = len(group_sizes)
    depth = _choose_depth(rows, kernels)
    tile, inner, columns = blocks or GroupedBlocks(128, depth, 128)

    # Tiles of rows: each one's group, first row, rows, and parts of D to sum up.
    num_padding = R - group_sizes.sum(dtype=group_sizes.dtype)
    lengths = jnp.append(group_sizes, num_padding)
    group, start, count = plan_group_tiles(lengths, R, tile)
    is_product = (group < G) & (count > 0)
    parts = jnp.where(is_product, pl.cdiv(D, inner), 0)
    sums = accumulation_dtype(rows.dtype, kernels.dtype)

    def kernel(visits, row_ref, kernel_ref, row_scale_ref, column_scale_ref, out_ref):
        group_ref, start_ref, count_ref, parts_ref = visits
        # The grid is (column in a band, tile of rows, band).
        step = pl.program_id(1)
        n = pl.program_id(2) * _BAND + pl.program_id(0)
        g = group_ref[step]
        begin = start_ref[step]
        tile_rows = pl.ds(begin, tile)
        tile_columns = pl.ds(n * columns, columns)
        in_group = jnp.arange(tile) < count_ref[step]
        in_f = n * columns + jnp.arange(columns) < F

        def add(i, total):
            """Adds the product over part i of D, [tile, columns]."""
            part = pl.ds(i * inner, inner)
            in_d = None if D % inner == 0 else i * inner + jnp.arange(inner) < D
            left = _load(row_ref.at[tile_rows, part], in_group, in_d)
            if transposed:
                right = _load(kernel_ref.at[g, tile_columns, part], in_f, in_d).T
            else:
                right = _load(kernel_ref.at[g, part, tile_columns], in_d, in_f)
            return total + _product(left, right)

        zeros = jnp.zeros((tile, columns), sums)
        # The last band may have columns that are none.
        num_parts = parts_ref[step] * (n * columns < F)
        y = lax.fori_loop(0, num_parts, add, zeros)

        # Group G is the padding, which has no scales.
        if row_scale_ref is not None:
            y *= _load(row_scale_ref.at[tile_rows], in_group & (g < G))[:, None]
        if column_scale_ref is not None:
            y *= _load(column_scale_ref.at[g, tile_columns], in_f & (g < G))
        plgpu.store(
            out_ref.at[tile_rows, tile_columns],
            y.astype(dtype),
            mask=in_group[:, None] & in_f,
        )

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, F), dtype),
        grid=(_BAND, len(group), pl.cdiv(F, columns * _BAND)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=_cost(R, D, F, rows, kernels),
        interpret=interpret,
        name="grouped_matmul",
    )((group, start, count, parts), rows, kernels, row_scales, column_scales)


def outer(
    rows: jax.Array,
    others: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: DTypeLike,
    blocks: GroupedBlocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See ``grouped_outer_product``. A program goes through all rows of its group."""
    rows = _make_readable(rows)
    others = _make_readable(others)
    R, D = rows.shape
    F = others.shape[1]
    default = GroupedBlocks(_choose_depth(rows, others), 128, 128)
    depth, inner, columns = blocks or default
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    sums = accumulation_dtype(rows.dtype, others.dtype)

    def kernel(start_ref, end_ref, row_ref, other_ref, out_ref):
        n = pl.program_id(0)
        m = pl.program_id(1)
        g = pl.program_id(2)
        start = start_ref[g]
        end = end_ref[g]
        tile_d = pl.ds(m * inner, inner)
        tile_f = pl.ds(n * columns, columns)
        in_d = m * inner + jnp.arange(inner) < D
        in_f = n * columns + jnp.arange(columns) < F

        def add(i, total):
            """Adds the product over ``depth`` rows of the group, [inner, columns]."""
            first = start + i * depth
            in_group = first + jnp.arange(depth) < end
            left = _load(row_ref.at[pl.ds(first, depth), tile_d], in_group, in_d)
            right = _load(other_ref.at[pl.ds(first, depth), tile_f], in_group, in_f)
            return total + _product(left.T, right)

        zeros = jnp.zeros((inner, columns), sums)
        y = lax.fori_loop(0, pl.cdiv(end - start, depth), add, zeros)
        mask = in_d[:, None] & in_f
        plgpu.store(out_ref.at[g, tile_d, tile_f], y.astype(dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(group_sizes), D, F), dtype),
        grid=(pl.cdiv(F, columns), pl.cdiv(D, inner), len(group_sizes)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        cost_estimate=_cost(R, D, F, rows, others),
        interpret=interpret,
        name="grouped_outer",
    )(ends - group_sizes, ends, rows, others)


def _choose_depth(left: jax.Array, right: jax.Array) -> int:
    """Chooses how much is contracted at once: the 163 KB of shared memory that a block
    has on an A100 hold such parts of both operands with 128 rows and columns, a stage
    ahead each."""
    return 128 // max(left.dtype.itemsize, right.dtype.itemsize)


def _make_readable(x: jax.Array) -> jax.Array:
    """Widens float8_e4m3fn to bf16 where the card, as far as is known, does not read it."""
    device = get_mesh_device()
    kind = "" if device is None else device.device_kind
    reads_float8 = any(card in kind for card in _FLOAT8_CARDS)
    if x.dtype != jnp.float8_e4m3fn or reads_float8:
        return x
    return x.astype(jnp.bfloat16)


def _load(ref: Ref, *masks: jax.Array | None) -> jax.Array:
    """Reads an array of one or two dimensions, and zeros where the mask of any
    dimension, if it has one, is false."""
    mask = None
    for axis, axis_mask in enumerate(masks):
        if axis_mask is None:
            continue
        if len(masks) > 1:
            axis_mask = jnp.expand_dims(axis_mask, 1 - axis)
        mask = axis_mask if mask is None else mask & axis_mask
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref, mask=mask, other=other)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiplies; operands of two types are widened to fp32 if one is, else to bf16."""
    sums = accumulation_dtype(left.dtype, right.dtype)
    if left.dtype != right.dtype:
        wide = jnp.float32 if jnp.float32 in (left.dtype, right.dtype) else jnp.bfloat16
        left = left.astype(wide)
        right = right.astype(wide)
    return jnp.dot(left, right, preferred_element_type=sums)


def _cost(R: int, D: int, F: int, *arrays: jax.Array) -> pl.CostEstimate:
    bytes_read = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(
        flops=2 * R * D * F, bytes_accessed=bytes_read, transcendentals=0
    )
