"""Matrices as blocks along their columns, and codes as the arrays of their bits.

The searches for scales work on [numbers of a block, ..., R, blocks]: all blocks at
once, and sums over a block in its order.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.quantization.formats.packing import (
    list_packed_widths,
    pack_codes,
    unpack_codes,
)

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


def split_codes(codes: jax.Array, bits: int) -> dict[str, jax.Array]:
    """Returns uint8 codes [..., C] of fewer than eight bits as packed arrays by name,
    ``codes4`` and ``codes1`` for five."""
    planes = {}
    low = 0
    for width in list_packed_widths(bits):
        part = (codes >> low) & ((1 << width) - 1)
        planes[f"codes{width}"] = pack_codes(part, width)
        low += width
    return planes


def join_codes(planes: Mapping[str, jax.Array], bits: int) -> jax.Array:
    """Returns uint8 codes [..., C]; inverts :func:`split_codes`."""
    codes = None
    low = 0
    for width in list_packed_widths(bits):
        part = unpack_codes(planes[f"codes{width}"], width) << low
        codes = part if codes is None else codes | part
        low += width
    assert codes is not None
    return codes


def multiply_out(units: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns fp32 scales [..., blocks of a row] of fp16 units [..., superblocks] and
    whole numbers [..., superblocks, blocks]."""
    products = units.astype(jnp.float32)[..., None] * codes.astype(jnp.float32)
    return products.reshape(*units.shape[:-1], -1)
