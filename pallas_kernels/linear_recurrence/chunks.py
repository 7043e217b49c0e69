"""Products within a chunk of tokens, by levels of blocks.

Sums of log decays run from one token to a later one. A difference of two cumulative
sums would lose digits (after 60 tokens of −20, fp32 knows the sum to 1e-4), and by
channel exp() of each cumulative sum alone would overflow. So pairs of tokens are put
into levels. At level m, blocks of m tokens lie side by side, and a pair belongs to the
level whose blocks m of a pair of blocks hold one token each:

    level 1    level 2    level 4          A pair (i, j) of level m meets at the boundary
    ▪          ▪          ▪                between its two blocks:
    1▪         1▪         1▪
      ▪        22▪        22▪                Σ j+1..i = Σ j+1..boundary + Σ boundary..i
      1▪       221▪       221▪
        ▪          ▪      4444▪            Both terms are sums of few numbers, of one
        1▪         1▪     44441▪           sign, and never differences. For log decays
          ▪        22▪    444422▪          that are not positive both exponentials are
          1▪       221▪   4444221▪         at most 1, so any decay is exact to the
                                           rounding of the result.

A log decay above 0 is exact too while exp() of no sum within a chunk overflows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Levels below are products of whole blocks of so many tokens, masked: a matrix unit
# gains nothing from smaller ones.
BASE = 16


class LevelSums(NamedTuple):
    """Sums of log decays within blocks of ``size`` tokens, [..., L, K] (K = 1 where a
    head's channels decay alike)."""

    size: int
    prefix: jax.Array
    """From a token's block's first token to itself, inclusive."""
    suffix: jax.Array
    """From behind a token to its block's last token, inclusive."""


class ChunkSums(NamedTuple):
    """Sums of log decays at every level, and over whole chunks."""

    levels: Sequence[LevelSums]
    """Of 1, 2, 4, ... L / 2 tokens."""
    chunk: LevelSums

    @property
    def total(self) -> jax.Array:
        """[..., 1, K], the sum of the chunk."""
        return self.chunk.prefix[..., -1:, :]


class LevelMatrix(NamedTuple):
    """A lower triangular [..., L, L] by levels."""

    base: jax.Array
    """[..., L / c, c, c], blocks of the diagonal, c = min(L, BASE)."""
    levels: Sequence[jax.Array]
    """[..., L / 2m, m, m] for m = c, 2c, ... L / 2: rows of the second block of a pair,
    columns of the first."""


def sum_decays(log_decay: jax.Array) -> ChunkSums:
    """Sums log decays [Z, G, L, K], L a power of two."""
    *batch, L, K = log_decay.shape
    levels = []
    sums = LevelSums(1, log_decay, jnp.zeros_like(log_decay))
    while sums.size < L:
        levels.append(sums)
        by_pair = (*batch, L // (2 * sums.size), 2, sums.size, K)
        prefix = sums.prefix.reshape(by_pair)
        suffix = sums.suffix.reshape(by_pair)
        first = prefix[..., 0, -1:, :]
        second = prefix[..., 1, -1:, :]
        zero = jnp.zeros_like(first)
        prefix = prefix + jnp.stack([zero, first], axis=-3)
        suffix = suffix + jnp.stack([second, zero], axis=-3)
        sums = LevelSums(
            2 * sums.size,
            prefix.reshape(log_decay.shape),
            suffix.reshape(log_decay.shape),
        )
    return ChunkSums(levels, sums)


def multiply_decayed(
    left: jax.Array,
    right: jax.Array,
    sums: ChunkSums,
    *,
    diagonal: bool,
    precision: lax.Precision,
) -> LevelMatrix:
    """Computes Σ_k left[i, k]·right[j, k]·exp(Σ of log decays of j+1..i, channel k) for
    j < i, and for j = i where ``diagonal``; zeros above.

    Args:
        left, right: [..., L, K], their batch dimensions broadcast against the sums'.
    """
    L = left.shape[-2]
    base = min(L, BASE)
    row = jnp.arange(base)[:, None]
    column = jnp.arange(base)
    left_blocks = split_rows(left, base)
    right_blocks = split_rows(right, base)
    products = jnp.zeros((), left.dtype)
    if diagonal:
        product = jnp.matmul(left_blocks, right_blocks.mT, precision=precision)
        products = jnp.where(row == column, product, 0)
    level_products = []
    for level in sums.levels:
        if level.size < base:
            product = _multiply_blocks(
                left_blocks,
                right_blocks,
                split_rows(level.prefix, base),
                split_rows(level.suffix, base),
                precision,
            )
            products = products + jnp.where(
                mask_level(row, column, level.size), product, 0
            )
        else:
            product = _multiply_blocks(
                split_rows(left, level.size)[..., 1::2, :, :],
                split_rows(right, level.size)[..., 0::2, :, :],
                split_rows(level.prefix, level.size)[..., 1::2, :, :],
                split_rows(level.suffix, level.size)[..., 0::2, :, :],
                precision,
            )
            level_products.append(product)
    batch = jnp.broadcast_shapes(left.shape[:-2], sums.chunk.prefix.shape[:-2])
    products = jnp.broadcast_to(products, (*batch, L // base, base, base))
    return LevelMatrix(products, level_products)


def _multiply_blocks(
    left: jax.Array,
    right: jax.Array,
    prefix: jax.Array,
    suffix: jax.Array,
    precision: lax.Precision,
) -> jax.Array:
    """Multiplies blocks [..., m, K] whose pairs of tokens meet at one boundary."""
    prefix = jnp.exp(prefix)
    suffix = jnp.exp(suffix)
    if prefix.shape[-1] == 1:
        # Value heads of one key head share its product.
        product = jnp.matmul(left, right.mT, precision=precision)
        return product * prefix * suffix.mT
    return jnp.matmul(left * prefix, (right * suffix).mT, precision=precision)


def mask_level(row: jax.Array, column: jax.Array, size: int) -> jax.Array:
    """Returns which pairs of tokens belong to the level of ``size``."""
    block = row // size
    return (block % 2 == 1) & (column // size == block - 1)


def split_rows(x: jax.Array, size: int) -> jax.Array:
    """Reshapes [..., L, K] to [..., L / size, size, K]."""
    *batch, L, K = x.shape
    return x.reshape(*batch, L // size, size, K)


def scale_rows(matrix: LevelMatrix, factors: jax.Array) -> LevelMatrix:
    """Multiplies rows by ``factors`` [..., L, 1]."""
    base = matrix.base * split_rows(factors, matrix.base.shape[-1])
    levels = [
        level * split_rows(factors, level.shape[-1])[..., 1::2, :, :]
        for level in matrix.levels
    ]
    return LevelMatrix(base, levels)


def assemble(matrix: LevelMatrix) -> jax.Array:
    """Writes out a matrix, [..., L, L]."""
    blocks = matrix.base
    for level in matrix.levels:
        blocks = _join_pairs(blocks, level)
    return blocks[..., 0, :, :]


def invert_unit_lower(matrix: LevelMatrix, precision: lax.Precision) -> jax.Array:
    """Inverts I + A for a strictly lower A, [..., L, L].

    Block diagonals double: if X inverts the diagonal blocks of m tokens and S is what
    blocks of 2m have beside them, then (X⁻¹ + S)⁻¹ = X − X·S·X, as S·X·S = 0 (the
    triangular inverse of Golub & Van Loan 2013, §3.1). Each X is the inverse of a part
    of the matrix. Neumann series and Newton's iteration from I go through powers of A
    instead, which overflow before they vanish: keys that repeat give binomials of 64.
    """
    base = matrix.base.shape[-1]
    row = jnp.arange(base)[:, None]
    column = jnp.arange(base)
    inverse = jnp.broadcast_to(
        jnp.eye(base, dtype=matrix.base.dtype), matrix.base.shape
    )
    size = 1
    while size < base:
        beside = jnp.where(mask_level(row, column, size), matrix.base, 0)
        if size == 1:
            inverse = inverse - beside
        else:
            inverse = inverse - _multiply_three(inverse, beside, inverse, precision)
        size *= 2
    for level in matrix.levels:
        first = inverse[..., 0::2, :, :]
        second = inverse[..., 1::2, :, :]
        beside = -_multiply_three(second, level, first, precision)
        inverse = _join_pairs(inverse, beside)
    return inverse[..., 0, :, :]


def _multiply_three(
    first: jax.Array, second: jax.Array, third: jax.Array, precision: lax.Precision
) -> jax.Array:
    product = jnp.matmul(first, second, precision=precision)
    return jnp.matmul(product, third, precision=precision)


def _join_pairs(blocks: jax.Array, beside: jax.Array) -> jax.Array:
    """Joins diagonal blocks [..., 2n, m, m] by what lies below each first one, [..., n,
    m, m], to [..., n, 2m, 2m]."""
    first = blocks[..., 0::2, :, :]
    second = blocks[..., 1::2, :, :]
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    below = jnp.concatenate([beside, second], axis=-1)
    return jnp.concatenate([above, below], axis=-2)
