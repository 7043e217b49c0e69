"""The searches of k-quants for a scale: ``make_qx_quants`` and ``make_q3_quants`` of
ggml-quants.c."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    find_signed_extreme,
    round_to_integer,
    sum_in_order,
)

SMALLEST_EXTREME = 1e-15
"""Blocks of smaller numbers are zeros (``GROUP_MAX_EPS``)."""


class SymmetricFit(NamedTuple):
    """Blocks' scales [...], of either sign, and the int32 codes [size, ...] by which
    the search chose them, not negative; of blocks of zeros zeros."""

    scales: jax.Array
    codes: jax.Array


class _Fit(NamedTuple):
    """The best so far, each [...]."""

    scales: jax.Array
    gains: jax.Array
    """By how much codes of these scales lower the weighted squared error."""
    inverse_scales: jax.Array


def fit_symmetric_blocks(
    blocks: jax.Array, weights: jax.Array, half: int
) -> SymmetricFit:
    """Returns the scale of each block of ``blocks`` and ``weights``, fp32 [size, ...],
    for codes from -half to half - 1.

    Tried are 19 scales about that by which the number of the greatest magnitude becomes
    -half; of each the codes' weighted least squares give the scale.
    """
    rounding = SeparateRounding.of(blocks[0])
    extremes = find_signed_extreme(blocks)
    is_zero = jnp.abs(extremes) < SMALLEST_EXTREME

    def sum_products(inverse_scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        def list_terms(block: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            codes = _quantize(block, inverse_scales, half, rounding)
            codes = codes.astype(jnp.float32)
            products = rounding.multiply(weight * block, codes)
            return products, rounding.multiply(weight * codes, codes)

        product_sums, square_sums = sum_in_order(list_terms, blocks, weights)
        return product_sums, square_sums

    inverse_scales = -half / extremes
    product_sums, square_sums = sum_products(inverse_scales)
    scales = jnp.where(square_sums == 0, 0, product_sums / square_sums)
    best = _Fit(scales, rounding.seal(scales) * product_sums, inverse_scales)
    tries = np.array([*range(-9, 0), *range(1, 10)], np.float32)
    numerators = jnp.asarray(-(np.float32(half) + np.float32(0.1) * tries))

    def try_scale(number: jax.Array, best: _Fit) -> _Fit:
        inverse_scales = numerators[number] / extremes
        product_sums, square_sums = sum_products(inverse_scales)
        is_better = product_sums * product_sums > best.gains * square_sums
        is_better = is_better & (square_sums > 0)
        scales = rounding.seal(product_sums / square_sums)
        tried = _Fit(scales, scales * product_sums, inverse_scales)
        return jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), tried, best
        )

    best = lax.fori_loop(0, len(tries), try_scale, best)
    codes = _quantize(blocks, best.inverse_scales, half, rounding) + half
    return SymmetricFit(
        scales=jnp.where(is_zero, 0, best.scales),
        codes=jnp.where(is_zero, 0, codes),
    )


class _Descent(NamedTuple):
    """Codes [size, ...] and their sums of products and of squares, each [...]."""

    codes: jax.Array
    product_sums: jax.Array
    square_sums: jax.Array


def descend_symmetric_blocks(blocks: jax.Array, half: int) -> SymmetricFit:
    """Returns the scale of each block of ``blocks``, fp32 [size, ...], for codes from
    -half to half - 1, weighted by the numbers' squares.

    The number of the greatest magnitude becomes -half. Then, five times over, each code
    in turn becomes the best one for the scale that all others give.
    """
    rounding = SeparateRounding.of(blocks[0])
    extremes = find_signed_extreme(blocks)
    is_zero = jnp.abs(extremes) < SMALLEST_EXTREME
    codes = _quantize(blocks, -half / extremes, half, rounding).astype(jnp.float32)

    def list_terms(block: jax.Array, codes: jax.Array) -> tuple[jax.Array, ...]:
        return _list_products(block, codes, rounding)

    product_sums, square_sums = sum_in_order(list_terms, blocks, codes)

    def change_code(step: jax.Array, descent: _Descent) -> _Descent:
        place = step % len(blocks)
        block = blocks[place]
        old_codes = descent.codes[place]
        products, squares = _list_products(block, old_codes, rounding)
        product_sums = descent.product_sums - products
        square_sums = descent.square_sums - squares
        best_codes = round_to_integer(block * square_sums / product_sums)
        best_codes = jnp.clip(best_codes, -half, half - 1).astype(jnp.float32)
        is_better = (product_sums > 0) & (best_codes != old_codes)
        products, squares = _list_products(block, best_codes, rounding)
        product_sums = product_sums + products
        square_sums = square_sums + squares
        old_gains = descent.product_sums * descent.product_sums * square_sums
        new_gains = product_sums * product_sums * descent.square_sums
        is_better = is_better & (square_sums > 0) & (new_gains > old_gains)
        new_codes = jnp.where(is_better, best_codes, old_codes)
        return _Descent(
            codes=lax.dynamic_update_index_in_dim(descent.codes, new_codes, place, 0),
            product_sums=jnp.where(is_better, product_sums, descent.product_sums),
            square_sums=jnp.where(is_better, square_sums, descent.square_sums),
        )

    # The original ends when no code changes; nothing does then after it.
    descent = _Descent(codes, product_sums, square_sums)
    descent = lax.fori_loop(0, 5 * len(blocks), change_code, descent)
    scales = descent.product_sums / descent.square_sums
    scales = jnp.where(descent.square_sums > 0, scales, 0)
    codes = descent.codes.astype(jnp.int32) + half
    return SymmetricFit(
        scales=jnp.where(is_zero, 0, scales),
        codes=jnp.where(is_zero, 0, codes),
    )


def _list_products(
    block: jax.Array, codes: jax.Array, rounding: SeparateRounding
) -> tuple[jax.Array, jax.Array]:
    """Returns weight · number · code and weight · code², of the weight number²."""
    weights = block * block
    products = rounding.multiply(weights * block, codes)
    return products, rounding.multiply(weights * codes, codes)


def _quantize(
    blocks: jax.Array, inverse_scales: jax.Array, half: int, rounding: SeparateRounding
) -> jax.Array:
    codes = round_to_integer(rounding.multiply(inverse_scales, blocks))
    return jnp.clip(codes, -half, half - 1)
