"""Matrices as blocks along their columns.

The searches for scales work on [numbers of a block, ..., R, blocks]: all blocks at
once, and sums over a block in its order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

SUPERBLOCK = 256
"""Numbers of a k-quant's superblock."""


def take_blocks(values: jax.Array, size: int) -> jax.Array:
    """Returns values [..., C] as blocks [size, ..., C / size]."""
    blocks = values.reshape(*values.shape[:-1], -1, size)
    return jnp.moveaxis(blocks, -1, 0)


def merge_blocks(blocks: jax.Array) -> jax.Array:
    """Returns [..., C] of blocks [size, ..., C / size]; inverts :func:`take_blocks`."""
    last = jnp.moveaxis(blocks, 0, -1)
    return last.reshape(*last.shape[:-2], -1)


def map_in_runs(
    function: Callable[[jax.Array], dict[str, jax.Array]], rows: jax.Array, run: int
) -> dict[str, jax.Array]:
    """Returns what ``function`` returns of ``rows`` [n, ...], ``run`` rows at once."""
    num_rows = len(rows)
    if num_rows <= run:
        return function(rows)
    num_runs = -(-num_rows // run)
    padding = [(0, num_runs * run - num_rows)] + [(0, 0)] * (rows.ndim - 1)
    runs = jnp.pad(rows, padding).reshape(num_runs, run, *rows.shape[1:])
    results = lax.map(function, runs)
    return jax.tree.map(
        lambda result: result.reshape(-1, *result.shape[2:])[:num_rows], results
    )


def multiply_out(units: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns fp32 scales [..., blocks of a row] of fp16 units [..., superblocks] and
    whole numbers [..., superblocks, blocks]."""
    products = units.astype(jnp.float32)[..., None] * codes.astype(jnp.float32)
    return products.reshape(*units.shape[:-1], -1)
