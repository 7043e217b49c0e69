"""Blocks of a matrix: the numbers that share a scale.

A :data:`BlockSize` counts rows and columns; None: all of the matrix. Blocks at the
lower and the right edge may be cut off where a format allows it.
"""

import jax
import jax.numpy as jnp

from maxlm.config.errors import MaxlmError

BlockSize = tuple[int | None, int | None]
"""Rows and columns of a block; None: all of the matrix."""


def count_blocks(rows: int, columns: int, block: BlockSize) -> tuple[int, int]:
    """Returns how many blocks, cut-off ones included, a matrix has in its rows and in
    its columns."""
    block_rows = block[0] or rows
    block_columns = block[1] or columns
    return -(-rows // block_rows), -(-columns // block_columns)


def split_blocks(values: jax.Array, block: BlockSize) -> jax.Array:
    """Returns values [..., R, C] as [..., blocks in R, blocks in C, numbers of a
    block]; cut-off blocks are filled up with zeros."""
    *lead, rows, columns = values.shape
    block_rows = block[0] or rows
    block_columns = block[1] or columns
    row_blocks, column_blocks = count_blocks(rows, columns, block)
    missing_rows = row_blocks * block_rows - rows
    missing_columns = column_blocks * block_columns - columns
    if missing_rows or missing_columns:
        edges = [(0, 0)] * len(lead) + [(0, missing_rows), (0, missing_columns)]
        values = jnp.pad(values, edges)
    blocks = values.reshape(*lead, row_blocks, block_rows, column_blocks, block_columns)
    blocks = jnp.swapaxes(blocks, -3, -2)
    return blocks.reshape(*lead, row_blocks, column_blocks, block_rows * block_columns)


def spread_over_blocks(
    scales: jax.Array, block: BlockSize, rows: int, columns: int
) -> jax.Array:
    """Returns one value a block [..., blocks in R, blocks in C] as an array that
    broadcasts against [..., R, C]."""
    block_rows, block_columns = block
    if block_rows not in (None, 1):
        scales = jnp.repeat(scales, block_rows, axis=-2)[..., :rows, :]
    if block_columns not in (None, 1):
        scales = jnp.repeat(scales, block_columns, axis=-1)[..., :columns]
    return scales


def check_whole_blocks(
    format_name: str, rows: int, columns: int, block_columns: int
) -> None:
    """Raises MaxlmError: ``columns`` is no whole number of ``block_columns``."""
    if columns % block_columns:
        raise MaxlmError(
            f"a matrix [{rows}, {columns}] is no whole number of {format_name}'s blocks"
            f" of {block_columns} columns",
            fix="use a format with a smaller block, or leave this matrix as it is",
        )
