"""Formats for tests of algorithms: integers, whose rule is written out here."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maxlm.quantization.algorithms.rounding import Scales
from maxlm.quantization.formats.format import Planes


@dataclass(frozen=True)
class PlainIntegers:
    """Integers of ``bits`` in groups of ``group`` columns; 0: whole rows."""

    bits: int
    group: int
    is_symmetric: bool = True

    @property
    def block_shape(self) -> tuple[int, int]:
        return 1, self.group

    def compute_scales(self, blocks: jax.Array) -> Scales:
        high = jnp.maximum(blocks.max(-1), 0)
        low = jnp.minimum(blocks.min(-1), 0)
        if self.is_symmetric:
            scales = jnp.maximum(high, -low) / (2**self.bits - 1) * 2
            return jnp.where(scales > 0, scales, 1), None
        scales = (high - low) / (2**self.bits - 1)
        scales = jnp.where(scales > 0, scales, 1)
        return scales, jnp.round(-low / scales)

    def round_to_codes(
        self, values: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        half = 2 ** (self.bits - 1)
        shift = half if zeros is None else zeros
        return jnp.clip(jnp.round(values / scales) + shift, 0, 2 * half - 1)

    def decode_codes(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        shift = 2 ** (self.bits - 1) if zeros is None else zeros
        return (codes - shift) * scales

    def pack(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> Planes:
        planes = {"codes": codes.astype(jnp.uint8), "scales": scales}
        return planes if zeros is None else {**planes, "zeros": zeros}
