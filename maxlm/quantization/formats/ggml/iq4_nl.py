"""IQ4_NL: blocks of 32 with a scale in float16, and codes of 16 unevenly spaced
values."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxlm.quantization.formats.code_planes import join_codes, split_codes
from maxlm.quantization.formats.format import Planes
from maxlm.quantization.formats.ggml.blocks import merge_blocks, take_blocks
from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.layout import code_field, half_field
from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    find_signed_extreme,
    sum_in_order,
)
from maxlm.quantization.formats.ggml.symmetric_search import SMALLEST_EXTREME

BLOCK = 32
LEVELS = (
    *(-127, -104, -83, -65, -49, -35, -22, -10),
    *(1, 13, 25, 38, 53, 69, 89, 113),
)
"""``kvalues_iq4nl`` of llama.cpp, in order of the codes."""
_TRIES = 7


class _Fit(NamedTuple):
    """The best so far, each [...]."""

    scales: jax.Array
    gains: jax.Array
    """By how much codes of these scales lower the weighted squared error."""


class GgmlIQ4_NL(GgmlFormat):
    """4.5 bits a number: a scale, 4-bit codes of :data:`LEVELS`."""

    type_name = "IQ4_NL"
    block_columns = BLOCK
    fields = (half_field("scales"), code_field(4, 16, BLOCK))

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        """``quantize_iq4_nl``, which tries more scales than
        ``quantize_row_iq4_nl_ref``."""
        blocks = take_blocks(values, BLOCK)
        scales = fit_level_blocks(blocks, blocks * blocks)
        rounding = SeparateRounding.of(blocks)
        inverses = jnp.where(scales == 0, 0, 1 / scales)
        scaled = rounding.multiply(blocks, inverses)
        codes = _sum_steps(scaled, [1] * (len(LEVELS) - 1), 0)
        return {
            **split_codes(merge_blocks(codes.astype(jnp.uint8)), 4),
            "scales": scales.astype(jnp.float16),
        }

    def _decode(self, planes: Planes) -> jax.Array:
        levels = jnp.asarray(LEVELS, jnp.float32)[join_codes(planes, 4)]
        return levels * jnp.repeat(planes["scales"], BLOCK, axis=-1)


def fit_level_blocks(blocks: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the scales [...] of ``blocks`` and ``weights``, fp32 [32, ...]: the best
    of those by which the number of the greatest magnitude becomes -127 ± 7, or 127, each
    anew by its codes' weighted least squares."""
    rounding = SeparateRounding.of(blocks[0])
    extremes = find_signed_extreme(blocks)

    def sum_products(inverse_scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        def list_terms(block: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            levels = _round_to_level(rounding.multiply(inverse_scales, block))
            weighted = weight * levels
            products = rounding.multiply(weighted, block)
            return products, rounding.multiply(weighted, levels)

        product_sums, square_sums = sum_in_order(list_terms, blocks, weights)
        return product_sums, square_sums

    first_scales = rounding.seal(-extremes / rounding.seal(LEVELS[0]))
    product_sums, square_sums = sum_products(1 / first_scales)
    scales = rounding.seal(product_sums / square_sums)
    scales = jnp.where(square_sums > 0, scales, 0)
    best = _Fit(scales, scales * product_sums)

    def try_scale(number: jax.Array, best: _Fit) -> _Fit:
        numerator = (number - _TRIES + LEVELS[0]).astype(jnp.float32)
        product_sums, square_sums = sum_products(numerator / extremes)
        is_better = product_sums * product_sums > best.gains * square_sums
        is_better = is_better & (square_sums > 0)
        scales = rounding.seal(product_sums / square_sums)
        tried = _Fit(scales, scales * product_sums)
        return jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), tried, best
        )

    best = lax.fori_loop(0, 2 * _TRIES + 1, try_scale, best)
    return jnp.where(jnp.abs(extremes) < SMALLEST_EXTREME, 0, best.scales)


def _round_to_level(numbers: jax.Array) -> jax.Array:
    """Returns the nearest level, of two the higher."""
    steps = [float(high - low) for low, high in pairwise(LEVELS)]
    return _sum_steps(numbers, steps, float(LEVELS[0]))


def _sum_steps(numbers: jax.Array, steps: list, lowest: float) -> jax.Array:
    """Returns ``lowest`` and the steps whose middles the numbers reach."""
    middles = [np.float32(low + high) / 2 for low, high in pairwise(LEVELS)]
    total = jnp.full_like(numbers, lowest)
    for middle, step in zip(middles, steps, strict=True):
        total = total + jnp.where(numbers >= middle, jnp.float32(step), 0)
    return total
