"""A chunk of tokens of one head, as matrices that a kernel has in registers.

The formulas are those of :func:`~pallas_kernels.linear_recurrence.xla.run_block`.
Differentiation is JAX's, inside the kernel; products and the inverse have gradients of
their own.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_recurrence.chunks import mask_level
from pallas_kernels.linear_recurrence.products import (
    Matrix,
    ProductPrecision,
    invert_unit_lower,
    make_iotas,
    multiply,
    multiply_rows,
    multiply_transposed,
    sum_exactly,
)


class ChunkOperands(NamedTuple):
    """Values of one head's chunk of L tokens."""

    q: jax.Array | None
    """[L, K]; None where only states are wanted."""
    k: jax.Array
    """[L, K]."""
    v: jax.Array
    """[L, V]."""
    log_decay: jax.Array
    """fp32 [1, L], tokens along the lanes, or [L, K] by channel."""
    beta: jax.Array | None
    """fp32 [1, L]; None: no delta rule."""


MatrixT = TypeVar("MatrixT", bound=Matrix, covariant=True)
"""Matrices that meet a state: arrays, or terms that a kernel has read from memory."""


class ChunkProducts(NamedTuple, Generic[MatrixT]):
    """Matrices that a chunk computes without the state before it."""

    weights: MatrixT | None
    """[L, L], of what tokens write in outputs."""
    queries: MatrixT | None
    """[L, K] as they meet the state; what they read is multiplied by ``from_start``."""
    from_start: jax.Array | None
    """[L, 1]; None by channel, where ``queries`` are multiplied."""
    new: jax.Array
    """[L, V], what tokens write where the state before is zero."""
    read: MatrixT | None
    """[L, K], what of the state the delta rule takes from it; None without."""
    keys: MatrixT
    """[L, K], to the chunk's end by channel."""
    to_end: jax.Array | None
    """[L, 1]; None by channel, where ``keys`` are multiplied."""
    over_chunk: jax.Array
    """[1, 1], or by channel [K, 1]."""


def run_chunks(
    chunks: Sequence[ChunkOperands],
    state: jax.Array,
    level_sums: jax.Array | None,
    *,
    scale: float,
    precision: ProductPrecision,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs neighbouring chunks: outputs fp32 [L, V] each (none without q), and the
    state [K, V] behind them. Only what hands the state on goes in turn.

    Args:
        level_sums: :func:`make_level_sums` where decays are by channel.
        precision: of products of what is computed.
    """
    products = [multiply_chunk(chunk, level_sums, precision) for chunk in chunks]
    outputs = []
    for chunk_products in products:
        output, _, state = advance_over_chunk(chunk_products, state, scale, precision)
        if output is not None:
            outputs.append(output)
    return outputs, state


def advance_over_chunk(
    products: ChunkProducts[Matrix],
    state: jax.Array,
    scale: float,
    precision: ProductPrecision,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Returns a chunk's output, fp32 [L, V] (None without queries), what its tokens
    write, [L, V], and the state behind it, from the one before it, [K, V]."""
    written = products.new
    if products.read is not None:
        written = written - multiply(precision, products.read, state)
    output = None
    if products.queries is not None:
        assert products.weights is not None
        output = multiply(precision, products.queries, state)
        if products.from_start is not None:
            output = output * products.from_start
        output = scale * (output + multiply(precision, products.weights, written))
    to_add = written
    if products.to_end is not None:
        to_add = written * products.to_end
    added = multiply_transposed(precision, products.keys, to_add)
    return output, written, products.over_chunk * state + added


def multiply_chunk(
    chunk: ChunkOperands, level_sums: jax.Array | None, precision: ProductPrecision
) -> ChunkProducts[jax.Array]:
    """Computes what a chunk needs of itself."""
    # By channel there is a row a token: 16 or more.
    if chunk.log_decay.shape[0] == 1:
        return _multiply_by_head(chunk, precision)
    if level_sums is None:
        factors = _compute_factors_by_level(chunk.log_decay)
    else:
        factors = _compute_factors(level_sums, chunk.log_decay)
    return _multiply_by_channel(chunk, factors, precision)


class HeadFactors(NamedTuple):
    """Decays of a chunk whose channels decay alike."""

    from_start: jax.Array
    """[L, 1], from the chunk's start to a token, inclusive."""
    to_end: jax.Array
    """[L, 1], from behind a token to the chunk's end."""
    over_chunk: jax.Array
    """[1, 1]."""


def compute_head_factors(log_decay: jax.Array) -> HeadFactors:
    """Sums log decays [1, L]."""
    row, column = make_iotas(log_decay.shape[1])
    up_to_row = jnp.where(column <= row, log_decay, 0.0)
    behind_row = jnp.where(column > row, log_decay, 0.0)
    return HeadFactors(
        jnp.exp(jnp.sum(up_to_row, axis=1, keepdims=True)),
        jnp.exp(jnp.sum(behind_row, axis=1, keepdims=True)),
        jnp.exp(jnp.sum(log_decay, axis=1, keepdims=True)),
    )


class _ChannelFactors(NamedTuple):
    """Decays of a chunk by channel."""

    levels: Sequence[jax.Array]
    """[L, K] of each level: see :func:`make_level_sums`."""
    from_start: jax.Array
    """[L, K]."""
    to_end: jax.Array
    """[L, K]."""
    over_chunk: jax.Array
    """[K, 1]."""


def _compute_factors(level_sums: jax.Array, log_decay: jax.Array) -> _ChannelFactors:
    """Sums log decays [L, K] at all levels by one product."""
    L = log_decay.shape[0]
    factors = jnp.exp(sum_exactly(level_sums, log_decay))
    num_levels = L.bit_length() - 1
    levels = [factors[level * L : (level + 1) * L] for level in range(num_levels)]
    from_start = factors[num_levels * L : (num_levels + 1) * L]
    to_end = factors[(num_levels + 1) * L :]
    over_chunk = _turn_to_column(from_start[L - 1 :])
    return _ChannelFactors(levels, from_start, to_end, over_chunk)


def _compute_factors_by_level(log_decay: jax.Array) -> _ChannelFactors:
    """Does the same for Triton, which cuts no array: a product a level."""
    L = log_decay.shape[0]
    row, column = make_iotas(L)
    levels = []
    size = 1
    while size < L:
        is_same_block = row // size == column // size
        is_second = (row // size) % 2 == 1
        is_summed = (is_second & (column <= row)) | (~is_second & (column > row))
        levels.append(_sum_masked(is_same_block & is_summed, log_decay))
        size *= 2
    over_chunk = jnp.exp(jnp.sum(log_decay, axis=0))[:, None]
    return _ChannelFactors(
        levels,
        _sum_masked(column <= row, log_decay),
        _sum_masked(column > row, log_decay),
        over_chunk,
    )


def _sum_masked(mask: jax.Array, log_decay: jax.Array) -> jax.Array:
    return jnp.exp(sum_exactly(mask.astype(jnp.bfloat16), log_decay))


def _multiply_by_head(
    chunk: ChunkOperands, precision: ProductPrecision
) -> ChunkProducts[jax.Array]:
    L = chunk.k.shape[0]
    row, column = make_iotas(L)
    k = chunk.k.astype(jnp.float32)
    v = chunk.v.astype(jnp.float32)
    # Sums of j+1..i are a product with zeros and ones: no differences.
    up_to_row = jnp.where(column <= row, chunk.log_decay, 0.0)
    behind = jnp.where(row > column, 1.0, 0.0)
    decay = jnp.exp(sum_exactly(up_to_row, behind))
    from_start, to_end, over_chunk = compute_head_factors(chunk.log_decay)
    weights = None
    queries = None
    if chunk.q is not None:
        queries = chunk.q.astype(jnp.float32)
        products = multiply_rows(precision, chunk.q, chunk.k)
        weights = jnp.where(row >= column, products * decay, 0.0)
    new = v
    read = None
    if chunk.beta is not None:
        beta = _turn_to_column(chunk.beta)
        products = multiply_rows(precision, chunk.k, chunk.k)
        below = jnp.where(row > column, beta * products * decay, 0.0)
        inverse = invert_unit_lower(precision, below)
        new = multiply(precision, inverse, beta * v)
        read = multiply(precision, inverse, beta * from_start * k)
    return ChunkProducts(weights, queries, from_start, new, read, k, to_end, over_chunk)


def _multiply_by_channel(
    chunk: ChunkOperands, factors: _ChannelFactors, precision: ProductPrecision
) -> ChunkProducts[jax.Array]:
    L = chunk.k.shape[0]
    row, column = make_iotas(L)
    k = chunk.k.astype(jnp.float32)
    v = chunk.v.astype(jnp.float32)
    q = None if chunk.q is None else chunk.q.astype(jnp.float32)
    # Weights of keys and queries on keys, below the diagonal.
    on_keys = jnp.zeros((L, L), jnp.float32)
    weights = jnp.zeros((L, L), jnp.float32)
    for level, factor in enumerate(factors.levels):
        is_level = mask_level(row, column, 1 << level)
        level_k = k * factor
        if chunk.beta is not None:
            product = multiply_rows(precision, level_k, level_k)
            on_keys = on_keys + jnp.where(is_level, product, 0.0)
        if q is not None:
            product = multiply_rows(precision, q * factor, level_k)
            weights = weights + jnp.where(is_level, product, 0.0)
    queries = None
    if q is not None:
        queries = q * factors.from_start
        dots = jnp.sum(q * k, axis=1, keepdims=True)
        weights = weights + jnp.where(row == column, dots, 0.0)
    new = v
    read = None
    if chunk.beta is not None:
        beta = _turn_to_column(chunk.beta)
        inverse = invert_unit_lower(precision, beta * on_keys)
        new = multiply(precision, inverse, beta * v)
        read = multiply(precision, inverse, beta * factors.from_start * k)
    keys = k * factors.to_end
    return ChunkProducts(
        weights, queries, None, new, read, keys, None, factors.over_chunk
    )


def make_level_sums(L: int) -> np.ndarray:
    """Returns zeros and ones that sum a chunk's log decays, [(levels + 2) · L, L].

    Rows of level m: for a token in the second block of its pair the sum from the
    block's start to itself, in the first that from behind itself to the block's end.
    Then the sums from the chunk's start, and those to its end.
    """
    row = np.arange(L)[:, None]
    column = np.arange(L)
    sums = []
    size = 1
    while size < L:
        is_same_block = row // size == column // size
        is_second = (row // size) % 2 == 1
        is_summed = np.where(is_second, column <= row, column > row)
        sums.append(is_same_block & is_summed)
        size *= 2
    sums += [column <= row, column > row]
    return np.concatenate(sums).astype(np.float32)


def _turn_to_column(x: jax.Array) -> jax.Array:
    """Returns [1, L] as [L, 1]."""
    row, column = make_iotas(x.shape[1])
    return jnp.sum(jnp.where(row == column, x, 0.0), axis=1, keepdims=True)
