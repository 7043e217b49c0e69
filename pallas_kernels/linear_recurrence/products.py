"""Products of matrices inside a kernel, in the precision that a recurrence's operands
deserve, with gradients of the same precision."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_recurrence.chunks import mask_level

Result = TypeVar("Result")


class ProductPrecision(Enum):
    """How fp32 matrices are multiplied; those of bf16 are one product always."""

    BF16X3 = 2
    """As sums of two terms of bf16, less the smallest product: 2⁻¹⁶ off, which operands
    of 16 bits deserve."""
    BF16X6 = 3
    """As sums of three terms, less the three smallest products: 2⁻²³ off."""
    FP32 = 0
    """As the platform multiplies fp32."""


Terms = tuple[jax.Array, ...]
"""Matrices of bf16 whose sum is one of fp32, the largest first."""
Matrix = jax.Array | Terms

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


def split_terms(precision: ProductPrecision, x: jax.Array) -> Terms:
    """Splits an fp32 matrix into the terms that products of this precision have."""
    return tuple(_split(x, precision.value))


def _get_terms(precision: ProductPrecision, x: Matrix) -> Sequence[jax.Array]:
    if isinstance(x, tuple):
        return x
    return [x] if x.dtype == jnp.bfloat16 else _split(x, precision.value)


def _dot(precision: ProductPrecision, left: Matrix, right: Matrix, dims) -> jax.Array:
    """Multiplies matrices, summed in fp32."""
    if precision == ProductPrecision.FP32:
        assert not isinstance(left, tuple)
        assert not isinstance(right, tuple)
        return lax.dot_general(
            left.astype(jnp.float32),
            right.astype(jnp.float32),
            dims,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def dot(left, right):
        return lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    num_terms = precision.value
    lefts = _get_terms(precision, left)
    rights = _get_terms(precision, right)
    product = dot(lefts[0], rights[0])
    for order in range(1, num_terms):
        for number, left_term in enumerate(lefts[: order + 1]):
            if order - number < len(rights):
                product += dot(left_term, rights[order - number])
    return product


class _Differentiable(Protocol):
    """A function whose gradients are rules; they are of arrays, not of terms."""

    def __call__(self, precision: ProductPrecision, *matrices: Matrix) -> jax.Array: ...

    def defvjp(
        self, fwd: Callable[..., Any], bwd: Callable[..., tuple[jax.Array, ...]]
    ) -> object: ...


def _define_gradients(function: Callable[..., jax.Array]) -> _Differentiable:
    """Gives a function of a precision and matrices rules, which follow below."""
    return jax.custom_vjp(function, nondiff_argnums=(0,))


@_define_gradients
def multiply(precision: ProductPrecision, left: Matrix, right: Matrix) -> jax.Array:
    """left · right."""
    return _dot(precision, left, right, _ROWS_BY_COLUMNS)


def _multiply_backward(precision, saved, d_product):
    left, right = saved
    d_left = _dot(precision, d_product, right, _ROWS_BY_ROWS)
    d_right = _dot(precision, left, d_product, _COLUMNS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


@_define_gradients
def multiply_rows(
    precision: ProductPrecision, left: Matrix, right: Matrix
) -> jax.Array:
    """left · rightᵀ."""
    return _dot(precision, left, right, _ROWS_BY_ROWS)


def _rows_backward(precision, saved, d_product):
    left, right = saved
    d_left = _dot(precision, d_product, right, _ROWS_BY_COLUMNS)
    d_right = _dot(precision, d_product, left, _COLUMNS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


@_define_gradients
def multiply_transposed(
    precision: ProductPrecision, left: Matrix, right: Matrix
) -> jax.Array:
    """leftᵀ · right."""
    return _dot(precision, left, right, _COLUMNS_BY_COLUMNS)


def _transposed_backward(precision, saved, d_product):
    left, right = saved
    d_left = _dot(precision, right, d_product, _ROWS_BY_ROWS)
    d_right = _dot(precision, left, d_product, _ROWS_BY_COLUMNS)
    return d_left.astype(left.dtype), d_right.astype(right.dtype)


def make_iotas(L: int) -> tuple[jax.Array, jax.Array]:
    """Returns numbers of rows and of columns, int32 [L, L]."""
    row = lax.broadcasted_iota(jnp.int32, (L, L), 0)
    column = lax.broadcasted_iota(jnp.int32, (L, L), 1)
    return row, column


@jax.custom_vjp
def sum_exactly(left: jax.Array, right: jax.Array) -> jax.Array:
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


@_define_gradients
def invert_unit_lower(precision: ProductPrecision, below: jax.Array) -> jax.Array:
    """Inverts I + A, A strictly lower [L, L], by block diagonals that double: see
    :func:`~pallas_kernels.linear_recurrence.chunks.invert_unit_lower`."""
    return _invert(precision, below)


def _invert(precision: ProductPrecision, below: jax.Array) -> jax.Array:
    L = below.shape[0]
    row, column = make_iotas(L)
    inverse = jnp.where(row == column, 1.0, 0.0)
    size = 1
    while size < L:
        beside = jnp.where(mask_level(row, column, size), below, 0.0)
        if size > 1:
            product = _dot(precision, inverse, beside, _ROWS_BY_COLUMNS)
            beside = _dot(precision, product, inverse, _ROWS_BY_COLUMNS)
        inverse = inverse - beside
        size *= 2
    return inverse


def _invert_forward(precision, below):
    inverse = _invert(precision, below)
    return inverse, inverse


def _invert_backward(precision, inverse, d_inverse):
    # d(M⁻¹) = −M⁻¹·dM·M⁻¹.
    product = _dot(precision, inverse, d_inverse, _COLUMNS_BY_COLUMNS)
    return (-_dot(precision, product, inverse, _ROWS_BY_ROWS),)


# Forward rules call no function that has rules itself: Triton has no form for those, so
# that its kernels are traced through jax.vjp also where no gradient is wanted.


def _forward_rule(dims):
    def run(precision, left, right):
        return _dot(precision, left, right, dims), (left, right)

    return run


multiply.defvjp(_forward_rule(_ROWS_BY_COLUMNS), _multiply_backward)
multiply_rows.defvjp(_forward_rule(_ROWS_BY_ROWS), _rows_backward)
multiply_transposed.defvjp(_forward_rule(_COLUMNS_BY_COLUMNS), _transposed_backward)
sum_exactly.defvjp(
    lambda left, right: (_sum_terms(left, right, _ROWS_BY_COLUMNS), (left, right)),
    _sum_exactly_backward,
)
invert_unit_lower.defvjp(_invert_forward, _invert_backward)


# Products without gradients, of matrices that may be terms already.


def multiply_plain(
    precision: ProductPrecision, left: Matrix, right: Matrix
) -> jax.Array:
    """left · right."""
    return _dot(precision, left, right, _ROWS_BY_COLUMNS)


def multiply_rows_plain(
    precision: ProductPrecision, left: Matrix, right: Matrix
) -> jax.Array:
    """left · rightᵀ."""
    return _dot(precision, left, right, _ROWS_BY_ROWS)


def multiply_transposed_plain(
    precision: ProductPrecision, left: Matrix, right: Matrix
) -> jax.Array:
    """leftᵀ · right."""
    return _dot(precision, left, right, _COLUMNS_BY_COLUMNS)


def without_gradients(function: Callable[..., Result], *arguments) -> Result:
    """Computes ``function(*arguments)`` by the forward rules of the functions here: see
    above."""
    result, _ = jax.vjp(function, *arguments)
    return result
