"""Scales that are powers of two, as the biased exponents of E8M0.

The Open Compute Project's Microscaling Formats v1.0, 5.4.1: 2^(exponent - 127); 255 is
not a number. How a block's scale follows from its largest magnitude has several rules,
named as torchao names them.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from maxlm.quantization.formats.arithmetic import divide_exactly

ScaleRule = Literal["floor", "rceil", "even", "ceil"]
"""How 2^e follows from the largest magnitude m of a block of numbers whose largest is M
and whose largest power of two is 2^E:

- ``floor``: e = floor(log2 m) - E, the rule of the specification (6.3). The largest
  numbers may saturate.
- ``even``: as floor, after m is rounded to the mantissa bits of the numbers.
- ``ceil``: e = ceil(log2 m) - E. Nothing saturates, and small numbers lose a bit.
- ``rceil``: e = ceil(log2(m / M)), the smallest scale by which nothing saturates
  (cuBLAS, block scaling)."""

SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)

_BIAS = 127
_MANTISSA_BITS = 23
_MANTISSA_MASK = (1 << _MANTISSA_BITS) - 1


def compute_scale_exponents(
    maxima: jax.Array,
    rule: ScaleRule,
    largest: float,
    largest_exponent: int,
    mantissa_bits: int,
) -> jax.Array:
    """Returns the uint8 biased exponents of the scales of blocks.

    Args:
        maxima: fp32, the largest magnitude of each block.
        largest: M, the largest of the numbers that blocks become.
        largest_exponent: E, the exponent of that.
        mantissa_bits: of these numbers.
    """
    if rule == "rceil":
        return _round_up_exponents(divide_exactly(maxima, largest))
    bits = jax.lax.bitcast_convert_type(maxima.astype(jnp.float32), jnp.int32)
    if rule == "even":
        bits = bits + (1 << (_MANTISSA_BITS - mantissa_bits - 1))
    exponents = (bits >> _MANTISSA_BITS) & 0xFF
    if rule == "ceil":
        exponents = exponents + ((bits & _MANTISSA_MASK) > 0)
    exponents = jnp.clip(exponents - largest_exponent, 0, 255)
    return jnp.where(jnp.isnan(maxima), 255, exponents).astype(jnp.uint8)


def round_up_to_power(scales: jax.Array) -> jax.Array:
    """Returns fp32 scales, each the smallest power of two that is no less."""
    return decode_exponents(_round_up_exponents(scales))


def decode_exponents(exponents: jax.Array) -> jax.Array:
    """Returns the fp32 scales of uint8 biased exponents."""
    bits = exponents.astype(jnp.int32) << _MANTISSA_BITS
    # 2^-127 is a denormal number, and the exponent 255 of fp32 is infinity.
    bits = jnp.where(exponents == 0, 1 << (_MANTISSA_BITS - 1), bits)
    scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, scales)


def _round_up_exponents(scales: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(scales.astype(jnp.float32), jnp.int32)
    exponents = bits >> _MANTISSA_BITS
    is_above_power = (bits & _MANTISSA_MASK) > 0
    rounded = jnp.minimum(exponents + is_above_power, 254)
    rounded = jnp.where(exponents == 0, 0, rounded)
    return jnp.where(jnp.isnan(scales), 255, rounded).astype(jnp.uint8)
