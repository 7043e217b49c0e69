"""Rounds the inputs of products, each token by itself."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.local import Axes
from maxlm.quantization.formats.floats8 import cast_to_float8

ActivationRounding = Literal["int8", "fp8"]
_LARGEST: dict[ActivationRounding, float] = {"int8": 127.0, "fp8": 448.0}
_LEAST_SCALE = 1e-12


class RoundedTokens(NamedTuple):
    """Inputs of a product as codes and scales."""

    codes: jax.Array
    """int8 or float8_e4m3fn [..., C]."""
    scales: jax.Array
    """fp32 [..., 1]."""

    def decode(self) -> jax.Array:
        """Returns the fp32 values [..., C] that the codes stand for."""
        return self.codes.astype(jnp.float32) * self.scales


def round_tokens(
    x: jax.Array, rounding: ActivationRounding, input_axes: Axes = ()
) -> RoundedTokens:
    """Rounds x [..., C] to the nearest codes, the largest magnitude of a token to the
    largest code: symmetric, so that 0 stays 0. ``input_axes``: mesh axes that C is split
    over, on shards; a token has one scale on all of them."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    if input_axes:
        largest = lax.pmax(largest, input_axes)
    scales = jnp.maximum(largest / _LARGEST[rounding], _LEAST_SCALE)
    if rounding == "fp8":
        return RoundedTokens(cast_to_float8(x / scales, "e4m3"), scales)
    codes = jnp.clip(jnp.round(x / scales), -127, 127)
    return RoundedTokens(codes.astype(jnp.int8), scales)
