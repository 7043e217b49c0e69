"""The search of k-quants for a scale and a minimum: ``make_qkx2_quants`` of
ggml-quants.c."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    round_to_integer,
    sum_in_order,
)


@dataclass(frozen=True)
class AffineSearch:
    """Which scales are tried.

    A block's range holds ``highest_code`` steps; tried are ``highest_code + first + i ·
    step`` for i from 0 to ``last``, each with the scale and the minimum of the weighted
    least squares of its codes.

    Args:
        absolute_error: choose by the sum of absolute errors; else of squared ones.
    """

    highest_code: int
    first: float
    step: float
    last: int
    absolute_error: bool = False

    def list_step_counts(self) -> np.ndarray:
        """Returns fp32 steps in a block's range, rounded as C rounds them."""
        tries = np.arange(self.last + 1, dtype=np.float32)
        offsets = np.float32(self.first) + np.float32(self.step) * tries
        return offsets + np.float32(self.highest_code)


class AffineFit(NamedTuple):
    """Blocks' scales and negated minima, both [...] and not negative, and what gives
    the codes of the search, :func:`compute_search_codes`."""

    scales: jax.Array
    negated_minima: jax.Array
    inverse_scales: jax.Array
    origins: jax.Array


class _Fit(NamedTuple):
    """The best so far; see :class:`AffineFit`."""

    errors: jax.Array
    scales: jax.Array
    minima: jax.Array
    inverse_scales: jax.Array
    origins: jax.Array


def fit_affine_blocks(
    blocks: jax.Array, weights: jax.Array, search: AffineSearch
) -> AffineFit:
    """Returns a scale and a minimum of each block of ``blocks`` and ``weights``, fp32
    [size, ...]."""
    rounding = SeparateRounding.of(blocks[0])
    minima = jnp.minimum(blocks.min(axis=0), 0)
    maxima = blocks.max(axis=0)
    is_flat = maxima == minima

    def weigh(block: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        return weight, rounding.multiply(weight, block)

    weight_sums, weighted_sums = sum_in_order(weigh, blocks, weights)

    def quantize(
        block: jax.Array, inverse_scales: jax.Array, origins: jax.Array
    ) -> jax.Array:
        codes = _quantize(block, inverse_scales, origins, search.highest_code, rounding)
        return codes.astype(jnp.float32)

    def sum_errors(
        inverse_scales: jax.Array,
        origins: jax.Array,
        scales: jax.Array,
        minima: jax.Array,
    ) -> jax.Array:
        def compute_error(block: jax.Array, weight: jax.Array) -> tuple[jax.Array]:
            codes = quantize(block, inverse_scales, origins)
            error = rounding.multiply(scales, codes) + minima - block
            error = jnp.abs(error) if search.absolute_error else error * error
            return (rounding.multiply(weight, error),)

        (errors,) = sum_in_order(compute_error, blocks, weights)
        return errors

    inverse_scales = rounding.seal(search.highest_code / (maxima - minima))
    scales = 1 / inverse_scales
    errors = sum_errors(inverse_scales, minima, scales, minima)
    best = _Fit(errors, scales, minima, inverse_scales, minima)
    step_counts = jnp.asarray(search.list_step_counts())

    def try_scale(number: jax.Array, best: _Fit) -> _Fit:
        # The range is one to the best minimum so far, as in the original.
        inverse_scales = step_counts[number] / (maxima - best.minima)

        def list_terms(block: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            codes = quantize(block, inverse_scales, best.minima)
            weighted = rounding.multiply(weight, codes)
            squares = rounding.multiply(weighted, codes)
            return weighted, squares, rounding.multiply(weighted, block)

        code_sums, square_sums, product_sums = sum_in_order(list_terms, blocks, weights)
        determinants = rounding.multiply(weight_sums, square_sums)
        determinants = determinants - rounding.multiply(code_sums, code_sums)
        scales = rounding.multiply(weight_sums, product_sums)
        scales = scales - rounding.multiply(weighted_sums, code_sums)
        scales = scales / determinants
        minima = rounding.multiply(square_sums, weighted_sums)
        minima = minima - rounding.multiply(code_sums, product_sums)
        minima = minima / determinants
        is_positive = minima > 0
        scales = jnp.where(is_positive, product_sums / square_sums, scales)
        minima = jnp.where(is_positive, 0, minima)
        errors = sum_errors(inverse_scales, best.minima, scales, minima)
        is_better = (determinants > 0) & (errors < best.errors)
        tried = _Fit(errors, scales, minima, inverse_scales, best.minima)
        return jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), tried, best
        )

    best = lax.fori_loop(0, search.last + 1, try_scale, best)
    return AffineFit(
        scales=jnp.where(is_flat, 0, best.scales),
        negated_minima=-best.minima,
        inverse_scales=jnp.where(is_flat, 0, best.inverse_scales),
        origins=best.origins,
    )


def compute_search_codes(
    blocks: jax.Array, fit: AffineFit, search: AffineSearch
) -> jax.Array:
    """Returns the int32 codes [size, ...] by which the search chose its scales; of
    blocks without a range zeros."""
    rounding = SeparateRounding.of(blocks[0])
    return _quantize(
        blocks, fit.inverse_scales, fit.origins, search.highest_code, rounding
    )


def _quantize(
    blocks: jax.Array,
    inverse_scales: jax.Array,
    origins: jax.Array,
    highest_code: int,
    rounding: SeparateRounding,
) -> jax.Array:
    numbers = rounding.multiply(inverse_scales, blocks - origins)
    return jnp.clip(round_to_integer(numbers), 0, highest_code)
