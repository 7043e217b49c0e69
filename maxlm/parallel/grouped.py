"""Matrix products of rows sorted by group, each group with a kernel of its own.

Two implementations of each. ``native``: XLA's ragged dot, a kernel on TPU (Mosaic) and a fused
loop or a library call on GPU. Otherwise, for CPU, whose ragged dot multiplies every row by every
kernel: blocks of rows of one group, one after the other. Forward only: who differentiates calls
them again (``dot`` of the transposed kernels, ``outer``).
"""

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a block: enough to pay for reading a kernel, few enough that padding small groups up to
# whole blocks stays cheap.
MAX_BLOCK, MIN_BLOCK = 128, 8


def dot(
    rows: jax.Array, kernels: jax.Array, sizes: jax.Array, *, turned: bool = False, native: bool
) -> jax.Array:
    """Each row times its group's kernel.

    Args:
        rows: [R, D]; group g's follow those of the groups before it. Rows beyond the last group
            may hold anything.
        kernels: [G, D, F], or [G, F, D] when ``turned``.
        sizes: int32 [G], rows of each group; their sum is at most R.

    Returns:
        [R, F] in the rows' dtype, accumulated in fp32; zeros beyond the last group.
    """
    if native:
        contracted = (((1,), (2 if turned else 1,)), ((), ()))
        numbers = lax.RaggedDotDimensionNumbers(contracted, [0], [0])
        out = lax.ragged_dot_general(rows, kernels, sizes, numbers)
        # What a ragged dot leaves beyond its groups is not defined.
        inside = jnp.arange(len(rows)) < sizes.sum()
        return jnp.where(inside[:, None], out, 0)
    block, (groups, starts, counts) = _blocks(len(rows), sizes)
    padded = _padded(rows, block)

    def body(out, step):
        group, start, count = step
        own = lax.dynamic_slice_in_dim(padded, start, block)
        kernel = kernels[group].T if turned else kernels[group]
        y = jnp.dot(own, kernel, preferred_element_type=jnp.float32)
        y = jnp.where(jnp.arange(block)[:, None] < count, y, 0).astype(out.dtype)
        # The zeros past a group's end are written over by the next block, which starts there.
        return lax.dynamic_update_slice_in_dim(out, y, start, 0), None

    width = kernels.shape[1 if turned else 2]
    out = jnp.zeros((len(padded), width), rows.dtype)
    return lax.scan(body, out, (groups, starts, counts))[0][: len(rows)]


def outer(rows: jax.Array, others: jax.Array, sizes: jax.Array, *, native: bool) -> jax.Array:
    """For each group the sum over its rows of row ⊗ other: the gradient of its kernel.

    Args:
        rows, others: [R, D] and [R, F], finite also beyond the last group, and zero there in one.

    Returns:
        [G, D, F] in the rows' dtype, accumulated in fp32.
    """
    if native:
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(rows, others, sizes, numbers)
    block, steps = _blocks(len(rows), sizes)
    left, right = _padded(rows, block), _padded(others, block)

    def body(total, step):
        group, start, count = step
        a, b = (lax.dynamic_slice_in_dim(x, start, block) for x in (left, right))
        a = jnp.where(jnp.arange(block)[:, None] < count, a, 0)
        own = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total.at[group].add(own), None

    zeros = jnp.zeros((len(sizes), rows.shape[1], others.shape[1]), jnp.float32)
    return lax.scan(body, zeros, steps)[0].astype(rows.dtype)


def _blocks(num_rows: int, sizes: jax.Array):
    """Rows a block, and (group, first row, rows) of each block; unused ones come last, empty."""
    block = min(MAX_BLOCK, max(MIN_BLOCK, num_rows // len(sizes)))
    ends = jnp.cumsum(-(-sizes // block))
    index = jnp.arange(num_rows // block + len(sizes))  # as many as any sizes can need
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1)
    done = (index - jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])[group]) * block
    count = jnp.clip(sizes[group] - done, 0, block)
    start = (jnp.cumsum(sizes) - sizes)[group] + jnp.minimum(done, sizes[group])
    return block, (group, start, count)


def _padded(rows: jax.Array, block: int) -> jax.Array:
    """Room for a block that starts at the last row."""
    return jnp.pad(rows, ((0, block), (0, 0)))
