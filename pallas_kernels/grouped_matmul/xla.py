"""Grouped products in XLA alone: blocks of rows of one group, one after the other.

For CPUs, whose ragged dot multiplies every row by every kernel, and wherever no kernel
is.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# Rows of a block: enough to pay for reading a kernel, few enough that padding small
# groups up to whole blocks stays cheap.
_MAX_BLOCK = 128
_MIN_BLOCK = 8


def matmul(
    rows: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    row_scales: jax.Array | None = None,
    column_scales: jax.Array | None = None,
    *,
    transposed: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """See ``grouped_matmul``."""
    block = _choose_block(rows, group_sizes)
    padded = _pad_rows(rows, block)
    if row_scales is not None:
        row_scales = _pad_rows(row_scales, block)
    # Of a kernel [D, F], or [F, D] when transposed.
    d_axis = 1 if transposed else 0

    def body(out, step):
        """Writes [block, F] of a group's rows from ``start`` on, ``count`` of them."""
        group, start, count = step
        block_rows = lax.dynamic_slice_in_dim(padded, start, block)
        y = _product(block_rows, kernels[group], 1, d_axis)
        if row_scales is not None:
            block_scales = lax.dynamic_slice_in_dim(row_scales, start, block)
            y *= block_scales[:, None]
        if column_scales is not None:
            y *= column_scales[group]
        in_group = jnp.arange(block)[:, None] < count
        y = jnp.where(in_group, y, 0).astype(out.dtype)
        # The zeros past a group's end are written over by the next block, which starts
        # there.
        return lax.dynamic_update_slice_in_dim(out, y, start, 0), None

    F = kernels.shape[1 if transposed else 2]
    out = jnp.zeros((len(padded), F), dtype)
    steps = plan_group_tiles(group_sizes, len(rows), block)
    out, _ = lax.scan(body, out, steps)
    return out[: len(rows)]


def outer(
    rows: jax.Array, others: jax.Array, group_sizes: jax.Array, *, dtype: DTypeLike
) -> jax.Array:
    """See ``grouped_outer_product``."""
    block = _choose_block(rows, group_sizes)
    padded_rows = _pad_rows(rows, block)
    padded_others = _pad_rows(others, block)

    def body(total, step):
        """Adds the product of a group's rows from ``start`` on to the group's sum."""
        group, start, count = step
        in_group = jnp.arange(block)[:, None] < count

        def cut(x: jax.Array) -> jax.Array:
            block_rows = lax.dynamic_slice_in_dim(x, start, block)
            return jnp.where(in_group, block_rows, jnp.zeros((), x.dtype))

        left = cut(padded_rows)
        right = cut(padded_others)
        product = _product(left, right, 0, 0)  # [D, F]
        return total.at[group].add(product), None

    shape = len(group_sizes), rows.shape[1], others.shape[1]
    zeros = jnp.zeros(shape, accumulation_dtype(rows.dtype, others.dtype))
    steps = plan_group_tiles(group_sizes, len(rows), block)
    total, _ = lax.scan(body, zeros, steps)
    return total.astype(dtype)


def plan_group_tiles(
    group_sizes: jax.Array, num_rows: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (group, first row, rows) of each block of rows of one group, as many as
    any sizes can need; unused ones come last, empty, and start where the last group
    ends."""
    num_groups = len(group_sizes)
    blocks_per_group = -(-group_sizes // block)
    ends = jnp.cumsum(blocks_per_group)
    # Each group rounds its own rows up: at most one block more than all would need.
    index = jnp.arange(num_rows // block + num_groups)
    group = jnp.searchsorted(ends, index, side="right")
    # Unused blocks are the last group's.
    group = jnp.minimum(group, num_groups - 1)
    first_block = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    # Rows of the group before the block.
    rows_before = (index - first_block[group]) * block
    count = jnp.clip(group_sizes[group] - rows_before, 0, block)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    start = first_row[group] + jnp.minimum(rows_before, group_sizes[group])
    return group, start, count


def accumulation_dtype(left: DTypeLike, right: DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums: int32 for integers, float64 for itself, else fp32."""
    if jnp.issubdtype(left, jnp.integer) and jnp.issubdtype(right, jnp.integer):
        return jnp.dtype(jnp.int32)
    return jnp.dtype(jnp.float64 if left == jnp.float64 else jnp.float32)


def _product(
    left: jax.Array, right: jax.Array, left_dim: int, right_dim: int
) -> jax.Array:
    """Contracted over one dimension each. Operands of two types, and 8-bit floats, are
    widened to the sums' type first."""
    sums = accumulation_dtype(left.dtype, right.dtype)
    are_float8 = left.dtype.itemsize == 1 and sums == jnp.float32
    if left.dtype != right.dtype or are_float8:
        left = left.astype(sums)
        right = right.astype(sums)
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return lax.dot_general(left, right, dims, preferred_element_type=sums)


def _choose_block(rows: jax.Array, sizes: jax.Array) -> int:
    """As many rows as a group has on average, in bounds."""
    mean_size = len(rows) // len(sizes)
    return min(_MAX_BLOCK, max(_MIN_BLOCK, mean_size))


def _pad_rows(rows: jax.Array, block: int) -> jax.Array:
    """Adds room for a block that starts at the last row."""
    others = ((0, 0),) * (rows.ndim - 1)
    return jnp.pad(rows, ((0, block), *others))
