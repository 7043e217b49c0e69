"""GGML's blocks of 32: a scale, or a scale and a minimum, in float16."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.quantization.formats.code_planes import join_codes, split_codes
from maxlm.quantization.formats.format import Planes
from maxlm.quantization.formats.ggml.blocks import merge_blocks, take_blocks
from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.layout import BlockField, code_field, half_field
from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    find_signed_extreme,
)

BLOCK = 32


class SymmetricBlocks(GgmlFormat):
    """Codes of b bits that stand for (code - 2^(b-1)) · scale."""

    block_columns = BLOCK
    code_bits: ClassVar[int]

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        """The number of the greatest magnitude becomes the lowest code,
        ``quantize_row_q4_0_ref``."""
        blocks = take_blocks(values, BLOCK)
        rounding = SeparateRounding.of(blocks[0])
        zero_code = 1 << (self.code_bits - 1)
        scales = find_signed_extreme(blocks) / -zero_code
        inverses = jnp.where(scales == 0, 0, 1 / scales)
        shifted = rounding.multiply(blocks, inverses) + (zero_code + 0.5)
        codes = jnp.minimum(shifted.astype(jnp.int32), 2 * zero_code - 1)
        return {
            **split_codes(merge_blocks(codes.astype(jnp.uint8)), self.code_bits),
            "scales": scales.astype(jnp.float16),
        }

    def _decode(self, planes: Planes) -> jax.Array:
        codes = join_codes(planes, self.code_bits)
        offset = 1 << (self.code_bits - 1)
        centred = codes.astype(jnp.float32) - offset
        return centred * jnp.repeat(planes["scales"], BLOCK, axis=-1)


class AffineBlocks(GgmlFormat):
    """Codes of b bits that stand for code · scale + minimum."""

    block_columns = BLOCK
    code_bits: ClassVar[int]

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        """The least number becomes the lowest code and the greatest the highest,
        ``quantize_row_q4_1_ref``."""
        blocks = take_blocks(values, BLOCK)
        rounding = SeparateRounding.of(blocks[0])
        highest_code = (1 << self.code_bits) - 1
        minima = blocks.min(axis=0)
        ranges = blocks.max(axis=0) - minima
        scales = rounding.seal(ranges / rounding.seal(highest_code))
        inverses = jnp.where(scales == 0, 0, 1 / scales)
        shifted = rounding.multiply(blocks - minima, inverses) + 0.5
        codes = jnp.minimum(shifted.astype(jnp.int32), highest_code)
        return {
            **split_codes(merge_blocks(codes.astype(jnp.uint8)), self.code_bits),
            "scales": scales.astype(jnp.float16),
            "minima": minima.astype(jnp.float16),
        }

    def _decode(self, planes: Planes) -> jax.Array:
        codes = join_codes(planes, self.code_bits).astype(jnp.float32)
        scales = jnp.repeat(planes["scales"], BLOCK, axis=-1)
        # The product has 16 bits at most and is exact: a fused sum rounds as ours.
        return codes * scales + jnp.repeat(planes["minima"], BLOCK, axis=-1)


class GgmlQ4_0(SymmetricBlocks):
    """4.5 bits a number: a scale, 4-bit codes."""

    type_name = "Q4_0"
    code_bits = 4
    fields = (half_field("scales"), code_field(4, 16, BLOCK))


class GgmlQ5_0(SymmetricBlocks):
    """5.5 bits a number: a scale, 5-bit codes."""

    type_name = "Q5_0"
    code_bits = 5
    fields = (half_field("scales"), code_field(1, 1, BLOCK), code_field(4, 16, BLOCK))


class GgmlQ4_1(AffineBlocks):
    """5 bits a number: a scale, a minimum, 4-bit codes."""

    type_name = "Q4_1"
    code_bits = 4
    fields = (half_field("scales"), half_field("minima"), code_field(4, 16, BLOCK))


class GgmlQ5_1(AffineBlocks):
    """6 bits a number: a scale, a minimum, 5-bit codes."""

    type_name = "Q5_1"
    code_bits = 5
    fields = (
        *(half_field("scales"), half_field("minima")),
        *(code_field(1, 1, BLOCK), code_field(4, 16, BLOCK)),
    )


class GgmlQ8_0(GgmlFormat):
    """8.5 bits a number: a scale, int8 codes."""

    type_name = "Q8_0"
    block_columns = BLOCK
    fields = (half_field("scales"), BlockField("codes", BLOCK, jnp.int8))

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        """The greatest magnitude becomes ±127, ``quantize_row_q8_0_ref``."""
        blocks = take_blocks(values, BLOCK)
        rounding = SeparateRounding.of(blocks[0])
        extremes = jnp.abs(blocks).max(axis=0)
        scales = rounding.seal(extremes / rounding.seal(127))
        inverses = jnp.where(scales == 0, 0, 1 / scales)
        codes = lax.round(blocks * inverses, lax.RoundingMethod.AWAY_FROM_ZERO)
        return {
            "codes": merge_blocks(codes.astype(jnp.int8)),
            "scales": scales.astype(jnp.float16),
        }

    def _decode(self, planes: Planes) -> jax.Array:
        scales = jnp.repeat(planes["scales"], BLOCK, axis=-1)
        return planes["codes"].astype(jnp.float32) * scales
