"""K-quants of scales alone: superblocks of 256, of which each block of 16 has a scale in
few bits, times one of the superblock in float16."""

from abc import abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp

from maxlm.quantization.formats.code_planes import join_codes, split_codes
from maxlm.quantization.formats.format import Planes
from maxlm.quantization.formats.ggml.blocks import (
    SUPERBLOCK,
    merge_blocks,
    multiply_out,
    take_blocks,
)
from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.layout import BlockField, code_field, half_field
from maxlm.quantization.formats.ggml.packed_scales import (
    pack_six_bit_scales,
    unpack_six_bit_scales,
)
from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    find_signed_extreme,
    round_to_integer,
)
from maxlm.quantization.formats.ggml.symmetric_search import (
    SMALLEST_EXTREME,
    SymmetricFit,
    descend_symmetric_blocks,
    fit_symmetric_blocks,
)

BLOCK = 16


class SymmetricSuperblocks(GgmlFormat):
    """Codes of b bits that stand for d · scale · (code - 2^(b-1)), where scales are
    whole numbers of either sign."""

    block_columns = SUPERBLOCK
    code_bits: ClassVar[int]
    scale_half: ClassVar[int]
    """The scale of the greatest magnitude becomes the negative of it."""

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        blocks = take_blocks(values, BLOCK)
        fit = self._fit(blocks)
        scales, d = self._quantize_scales(fit.scales)
        block_scales = multiply_out(d, scales)
        # A divisor of 16 numbers would become a factor.
        rounding = SeparateRounding.of(blocks)
        codes = round_to_integer(blocks / rounding.seal(block_scales))
        half = 1 << (self.code_bits - 1)
        codes = jnp.clip(codes, -half, half - 1) + half
        # Where a scale has become zero, the search's codes stay.
        codes = jnp.where(block_scales == 0, fit.codes, codes)
        return {
            **split_codes(merge_blocks(codes.astype(jnp.uint8)), self.code_bits),
            "scales": self._pack_scales(scales),
            "d": d,
        }

    def _decode(self, planes: Planes) -> jax.Array:
        scales = multiply_out(planes["d"], self._unpack_scales(planes["scales"]))
        codes = join_codes(planes, self.code_bits).astype(jnp.float32)
        half = 1 << (self.code_bits - 1)
        return (codes - half) * jnp.repeat(scales, BLOCK, axis=-1)

    def _quantize_scales(self, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns int32 scales [..., superblocks, 16] and their fp16 unit [...,
        superblocks], of fp32 scales [..., blocks of a row]."""
        scales = scales.reshape(*scales.shape[:-1], -1, SUPERBLOCK // BLOCK)
        extremes = find_signed_extreme(jnp.moveaxis(scales, -1, 0))
        rounding = SeparateRounding.of(extremes)
        inverses = rounding.seal(-self.scale_half / extremes)
        units = (1 / inverses).astype(jnp.float16)
        rounding = SeparateRounding.of(scales)
        codes = round_to_integer(rounding.multiply(inverses[..., None], scales))
        codes = jnp.clip(codes, -self.scale_half, self.scale_half - 1)
        is_zero = jnp.abs(extremes) < SMALLEST_EXTREME
        codes = jnp.where(is_zero[..., None], self._zero_scale, codes)
        return codes, jnp.where(is_zero, 0, units)

    _zero_scale: ClassVar[int]
    """The scale of a superblock of zeros."""

    @abstractmethod
    def _fit(self, blocks: jax.Array) -> SymmetricFit:
        """Returns the scales of blocks [16, ...]."""

    @abstractmethod
    def _pack_scales(self, scales: jax.Array) -> jax.Array:
        """Returns the array of scales int32 [..., superblocks, 16]."""

    @abstractmethod
    def _unpack_scales(self, packed: jax.Array) -> jax.Array:
        """Inverts :meth:`_pack_scales`."""


class GgmlQ3_K(SymmetricSuperblocks):
    """3.4375 bits a number: scales of six bits."""

    type_name = "Q3_K"
    code_bits = 3
    scale_half = 32
    _zero_scale = -32
    fields = (
        *(code_field(1, 32, SUPERBLOCK), code_field(2, 32, SUPERBLOCK)),
        *(BlockField("scales", 12), half_field("d")),
    )

    def _fit(self, blocks: jax.Array) -> SymmetricFit:
        return descend_symmetric_blocks(blocks, 4)

    def _pack_scales(self, scales: jax.Array) -> jax.Array:
        return pack_six_bit_scales(scales + 32)

    def _unpack_scales(self, packed: jax.Array) -> jax.Array:
        return unpack_six_bit_scales(packed) - 32


class GgmlQ6_K(SymmetricSuperblocks):
    """6.5625 bits a number: scales of eight bits."""

    type_name = "Q6_K"
    code_bits = 6
    scale_half = 128
    _zero_scale = 0
    fields = (
        *(code_field(4, 64, SUPERBLOCK), code_field(2, 32, SUPERBLOCK)),
        *(BlockField("scales", 16, jnp.int8), half_field("d")),
    )

    def _fit(self, blocks: jax.Array) -> SymmetricFit:
        return fit_symmetric_blocks(blocks, blocks * blocks, 32)

    def _pack_scales(self, scales: jax.Array) -> jax.Array:
        return scales.astype(jnp.int8).reshape(*scales.shape[:-2], -1)

    def _unpack_scales(self, packed: jax.Array) -> jax.Array:
        return packed.astype(jnp.int32).reshape(*packed.shape[:-1], -1, 16)
