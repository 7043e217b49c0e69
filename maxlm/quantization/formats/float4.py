"""FP4 E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives (Open Compute Project,
Microscaling Formats v1.0, 5.3.3). The code is the bits: sign, two of the exponent, one
of the mantissa."""

import jax
import jax.numpy as jnp

FLOAT4_LARGEST = 6.0
FLOAT4_LARGEST_EXPONENT = 2
FLOAT4_MANTISSA_BITS = 1


def encode_float4(values: jax.Array) -> jax.Array:
    """Returns the uint8 codes 0 .. 15 of fp32 values, rounded to nearest, half to the
    even code; what is too large becomes ±6."""
    magnitudes = jnp.abs(values)
    # Midpoints between codes: a tie goes up where the higher code is even.
    codes = (magnitudes > 0.25).astype(jnp.uint8)
    codes += (magnitudes >= 0.75).astype(jnp.uint8)
    codes += (magnitudes > 1.25).astype(jnp.uint8)
    codes += (magnitudes >= 1.75).astype(jnp.uint8)
    codes += (magnitudes > 2.5).astype(jnp.uint8)
    codes += (magnitudes >= 3.5).astype(jnp.uint8)
    codes += (magnitudes > 5.0).astype(jnp.uint8)
    return codes | (jnp.signbit(values).astype(jnp.uint8) << 3)


def decode_float4(codes: jax.Array) -> jax.Array:
    """Returns the fp32 values of codes 0 .. 15."""
    codes = codes.astype(jnp.int32)
    exponent = (codes >> 1) & 3
    mantissa = codes & 1
    # In halves: denormal numbers are 0 and 1, others (2 + mantissa) · 2^(exponent - 1).
    halves = jnp.where(exponent == 0, mantissa, (2 + mantissa) << (exponent - 1))
    magnitudes = 0.5 * halves.astype(jnp.float32)
    return jnp.where(codes & 8 != 0, -magnitudes, magnitudes)
