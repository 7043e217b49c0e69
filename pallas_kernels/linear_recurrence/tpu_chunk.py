"""A chunk of tokens of one head, as matrices that a TPU's kernel has in registers.

The formulas are those of :func:`~pallas_kernels.linear_recurrence.xla.run_block`.
Differentiation is JAX's, inside the kernel; products and the inverse have gradients of
their own.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.linear_recurrence.chunks import mask_level


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


class _ChunkProducts(NamedTuple):
    """What a chunk computes without the state before it."""

    weights: jax.Array | None
    """[L, L], of what tokens write in outputs."""
    queries: jax.Array | None
    """[L, K] as they meet the state; what they read is multiplied by ``from_start``."""
    from_start: jax.Array | None
    """[L, 1]; None by channel, where ``queries`` are multiplied."""
    new: jax.Array
    """[L, V], what tokens write where the state before is zero."""
    read: jax.Array | None
    """[L, K], what of the state the delta rule takes from it; None without."""
    keys: jax.Array
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
    is_narrow: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs neighbouring chunks: outputs fp32 [L, V] each (none without q), and the
    state [K, V] behind them. Only what hands the state on goes in turn.

    Args:
        level_sums: :func:`make_level_sums` where decays are by channel.
        is_narrow: whether operands have 16 bits: products of what is computed are three
            of bf16, not six.
    """
    products = [_multiply_chunk(chunk, level_sums, is_narrow) for chunk in chunks]
    multiply = partial(_multiply, is_narrow)
    outputs = []
    for chunk in products:
        written = chunk.new
        if chunk.read is not None:
            written = written - multiply(chunk.read, state)
        if chunk.queries is not None:
            assert chunk.weights is not None
            output = multiply(chunk.queries, state)
            if chunk.from_start is not None:
                output = output * chunk.from_start
            outputs.append(scale * (output + multiply(chunk.weights, written)))
        if chunk.to_end is not None:
            written = written * chunk.to_end
        state = chunk.over_chunk * state + _multiply_transposed(
            is_narrow, chunk.keys, written
        )
    return outputs, state


def _multiply_chunk(
    chunk: ChunkOperands, level_sums: jax.Array | None, is_narrow: bool
) -> _ChunkProducts:
    if level_sums is None:
        return _multiply_by_head(chunk, is_narrow)
    return _multiply_by_channel(chunk, level_sums, is_narrow)


def _multiply_by_head(chunk: ChunkOperands, is_narrow: bool) -> _ChunkProducts:
    multiply = partial(_multiply, is_narrow)
    L = chunk.k.shape[0]
    row, column = _iotas(L)
    k = chunk.k.astype(jnp.float32)
    v = chunk.v.astype(jnp.float32)
    # Sums of j+1..i are a product with zeros and ones: no differences.
    up_to_row = jnp.where(column <= row, chunk.log_decay, 0.0)
    behind = jnp.where(row > column, 1.0, 0.0)
    decay = jnp.exp(_sum_exactly(up_to_row, behind))
    from_start = jnp.exp(jnp.sum(up_to_row, axis=1, keepdims=True))
    to_end = jnp.exp(
        jnp.sum(jnp.where(column > row, chunk.log_decay, 0.0), axis=1, keepdims=True)
    )
    over_chunk = jnp.exp(jnp.sum(chunk.log_decay, axis=1, keepdims=True))
    weights = None
    queries = None
    if chunk.q is not None:
        queries = chunk.q.astype(jnp.float32)
        products = _multiply_rows(is_narrow, chunk.q, chunk.k)
        weights = jnp.where(row >= column, products * decay, 0.0)
    new = v
    read = None
    if chunk.beta is not None:
        beta = _turn_to_column(chunk.beta)
        products = _multiply_rows(is_narrow, chunk.k, chunk.k)
        below = jnp.where(row > column, beta * products * decay, 0.0)
        inverse = _invert(is_narrow, below)
        new = multiply(inverse, beta * v)
        read = multiply(inverse, beta * from_start * k)
    return _ChunkProducts(
        weights, queries, from_start, new, read, k, to_end, over_chunk
    )


def _multiply_by_channel(
    chunk: ChunkOperands, level_sums: jax.Array, is_narrow: bool
) -> _ChunkProducts:
    multiply = partial(_multiply, is_narrow)
    L = chunk.k.shape[0]
    row, column = _iotas(L)
    k = chunk.k.astype(jnp.float32)
    v = chunk.v.astype(jnp.float32)
    q = None if chunk.q is None else chunk.q.astype(jnp.float32)
    factors = jnp.exp(_sum_exactly(level_sums, chunk.log_decay))
    num_levels = L.bit_length() - 1
    from_start = factors[num_levels * L : (num_levels + 1) * L]
    to_end = factors[(num_levels + 1) * L :]
    over_chunk = _turn_to_column(from_start[L - 1 :])

    # Weights of keys and queries on keys, below the diagonal.
    on_keys = jnp.zeros((L, L), jnp.float32)
    weights = jnp.zeros((L, L), jnp.float32)
    for level in range(num_levels):
        factor = factors[level * L : (level + 1) * L]
        is_level = mask_level(row, column, 1 << level)
        level_k = k * factor
        if chunk.beta is not None:
            product = _multiply_rows(is_narrow, level_k, level_k)
            on_keys = on_keys + jnp.where(is_level, product, 0.0)
        if q is not None:
            product = _multiply_rows(is_narrow, q * factor, level_k)
            weights = weights + jnp.where(is_level, product, 0.0)
    queries = None
    if q is not None:
        queries = q * from_start
        dots = jnp.sum(q * k, axis=1, keepdims=True)
        weights = weights + jnp.where(row == column, dots, 0.0)
    new = v
    read = None
    if chunk.beta is not None:
        beta = _turn_to_column(chunk.beta)
        inverse = _invert(is_narrow, beta * on_keys)
        new = multiply(inverse, beta * v)
        read = multiply(inverse, beta * from_start * k)
    keys = k * to_end
    return _ChunkProducts(weights, queries, None, new, read, keys, None, over_chunk)


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


def _iotas(L: int) -> tuple[jax.Array, jax.Array]:
    row = lax.broadcasted_iota(jnp.int32, (L, L), 0)
    column = lax.broadcasted_iota(jnp.int32, (L, L), 1)
    return row, column


def _turn_to_column(x: jax.Array) -> jax.Array:
    """Returns [1, L] as [L, 1]."""
    row, column = _iotas(x.shape[1])
    return jnp.sum(jnp.where(row == column, x, 0.0), axis=1, keepdims=True)


_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
_COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))


def _split(x: jax.Array, parts: int) -> list[jax.Array]:
    """Returns fp32 numbers as sums of so many of bf16."""
    terms = []
    for _ in range(parts - 1):
        term = x.astype(jnp.bfloat16)
        terms.append(term)
        x = x - term.astype(jnp.float32)
    return [*terms, x.astype(jnp.bfloat16)]


def _dot(is_narrow: bool, left: jax.Array, right: jax.Array, dims) -> jax.Array:
    """Multiplies matrices, summed in fp32: of bf16 at once, of fp32 by three products
    of bf16 where operands are narrow, else by as many as fp32 takes."""
    if not is_narrow:
        return lax.dot_general(
            left.astype(jnp.float32),
            right.astype(jnp.float32),
            dims,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def dot(left, right):
        return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    lefts = [left] if left.dtype == jnp.bfloat16 else _split(left, 2)
    rights = [right] if right.dtype == jnp.bfloat16 else _split(right, 2)
    product = dot(lefts[0], rights[0])
    if len(rights) == 2:
        product += dot(lefts[0], rights[1])
    if len(lefts) == 2:
        product += dot(lefts[1], rights[0])
    return product


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(is_narrow: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    """left · right."""
    return _dot(is_narrow, left, right, _ROWS_BY_COLUMNS)


def _multiply_backward(is_narrow, saved, d_product):
    left, right = saved
    d_left = _dot(is_narrow, d_product, right, _ROWS_BY_ROWS)
    d_right = _dot(is_narrow, left, d_product, _COLUMNS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


def _multiply_rows(is_narrow: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    """left · rightᵀ; its type is lost where its gradient is defined."""
    return cast(jax.Array, _rows_product(is_narrow, left, right))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_product(is_narrow: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    """left · rightᵀ."""
    return _dot(is_narrow, left, right, _ROWS_BY_ROWS)


def _multiply_rows_backward(is_narrow, saved, d_product):
    left, right = saved
    d_left = _dot(is_narrow, d_product, right, _ROWS_BY_COLUMNS)
    d_right = _dot(is_narrow, d_product, left, _COLUMNS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


def _multiply_transposed(
    is_narrow: bool, left: jax.Array, right: jax.Array
) -> jax.Array:
    """leftᵀ · right; its type is lost where its gradient is defined."""
    return cast(jax.Array, _transposed_product(is_narrow, left, right))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed_product(
    is_narrow: bool, left: jax.Array, right: jax.Array
) -> jax.Array:
    """leftᵀ · right."""
    return _dot(is_narrow, left, right, _COLUMNS_BY_COLUMNS)


def _multiply_transposed_backward(is_narrow, saved, d_product):
    left, right = saved
    d_left = _dot(is_narrow, right, d_product, _ROWS_BY_ROWS)
    d_right = _dot(is_narrow, left, d_product, _ROWS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


@jax.custom_vjp
def _sum_exactly(left: jax.Array, right: jax.Array) -> jax.Array:
    """left · right where one of the two is zeros and ones: the other one's three terms
    of bf16 are all its digits."""
    return _sum_terms(left, right, _ROWS_BY_COLUMNS)


def _sum_terms(left: jax.Array, right: jax.Array, dims) -> jax.Array:
    def dot(left, right):
        return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    if left.dtype == jnp.bfloat16:
        terms = [dot(left, term) for term in _split(right, 3)]
    else:
        terms = [dot(term, right.astype(jnp.bfloat16)) for term in _split(left, 3)]
    # The smallest first.
    return (terms[2] + terms[1]) + terms[0]


def _sum_exactly_backward(saved, d_sums):
    left, right = saved
    # What is zeros and ones is a constant.
    if left.dtype == jnp.bfloat16:
        d_right = _sum_terms(left, d_sums, _COLUMNS_BY_COLUMNS)
        return jnp.zeros_like(left), d_right
    d_left = _sum_terms(d_sums, right, _ROWS_BY_ROWS)
    return d_left, jnp.zeros_like(right)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _invert(is_narrow: bool, below: jax.Array) -> jax.Array:
    """Inverts I + A, A strictly lower [L, L], by block diagonals that double: see
    :func:`~pallas_kernels.linear_recurrence.chunks.invert_unit_lower`."""
    L = below.shape[0]
    row, column = _iotas(L)
    inverse = jnp.where(row == column, 1.0, 0.0)
    size = 1
    while size < L:
        beside = jnp.where(mask_level(row, column, size), below, 0.0)
        if size > 1:
            product = _dot(is_narrow, inverse, beside, _ROWS_BY_COLUMNS)
            beside = _dot(is_narrow, product, inverse, _ROWS_BY_COLUMNS)
        inverse = inverse - beside
        size *= 2
    return inverse


def _invert_forward(is_narrow, below):
    inverse = _invert(is_narrow, below)
    return inverse, inverse


def _invert_backward(is_narrow, inverse, d_inverse):
    # d(M⁻¹) = −M⁻¹·dM·M⁻¹.
    product = _dot(is_narrow, inverse, d_inverse, _COLUMNS_BY_COLUMNS)
    return (-_dot(is_narrow, product, inverse, _ROWS_BY_ROWS),)


def _save_both(is_narrow, function, left, right):
    return function(is_narrow, left, right), (left, right)


_multiply.defvjp(
    lambda is_narrow, left, right: _save_both(is_narrow, _multiply, left, right),
    _multiply_backward,
)
_rows_product.defvjp(
    lambda is_narrow, left, right: _save_both(is_narrow, _rows_product, left, right),
    _multiply_rows_backward,
)
_transposed_product.defvjp(
    lambda is_narrow, left, right: _save_both(
        is_narrow, _transposed_product, left, right
    ),
    _multiply_transposed_backward,
)
_sum_exactly.defvjp(
    lambda left, right: (_sum_exactly(left, right), (left, right)),
    _sum_exactly_backward,
)
_invert.defvjp(_invert_forward, _invert_backward)
