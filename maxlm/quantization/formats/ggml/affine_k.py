"""K-quants of scales and minima: superblocks of 256, of which each block of 16 or 32
has a scale and a minimum in few bits, times two of the superblock in float16."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from maxlm.quantization.formats.code_planes import join_codes, split_codes
from maxlm.quantization.formats.format import Planes
from maxlm.quantization.formats.ggml.affine_search import (
    AffineSearch,
    compute_search_codes,
    fit_affine_blocks,
)
from maxlm.quantization.formats.ggml.blocks import (
    SUPERBLOCK,
    merge_blocks,
    multiply_out,
    take_blocks,
)
from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.layout import BlockField, code_field, half_field
from maxlm.quantization.formats.ggml.packed_scales import (
    pack_nibble_pairs,
    pack_six_bit_pairs,
    unpack_nibble_pairs,
    unpack_six_bit_pairs,
)
from maxlm.quantization.formats.ggml.rounding import (
    SeparateRounding,
    round_to_integer,
    sum_in_order,
)


class AffineSuperblocks(GgmlFormat):
    """Codes that stand for d · scale · code - dmin · minimum, where scales and minima
    are whole numbers."""

    block_columns = SUPERBLOCK
    code_bits: ClassVar[int]
    block_size: ClassVar[int]
    """Numbers that share a scale and a minimum."""
    highest_scale: ClassVar[int]
    """Of the whole numbers that scales and minima are."""
    search: ClassVar[AffineSearch]

    def _encode(self, values: jax.Array) -> dict[str, jax.Array]:
        blocks = take_blocks(values, self.block_size)
        fit = fit_affine_blocks(blocks, self._weigh(blocks), self.search)
        scales, d = self._quantize_scales(fit.scales)
        minima, dmin = self._quantize_scales(fit.negated_minima)
        block_scales = multiply_out(d, scales)
        # Products of 17 bits, which a fused sum rounds as ours.
        shifted = blocks + multiply_out(dmin, minima)
        # A divisor of 32 numbers would become a factor.
        rounding = SeparateRounding.of(blocks)
        codes = round_to_integer(shifted / rounding.seal(block_scales))
        codes = jnp.clip(codes, 0, self.search.highest_code)
        # Where a scale has become zero, the search's codes stay.
        search_codes = compute_search_codes(blocks, fit, self.search)
        codes = jnp.where(block_scales == 0, search_codes, codes)
        return {
            **split_codes(merge_blocks(codes.astype(jnp.uint8)), self.code_bits),
            "scales": self._pack_scales(scales, minima),
            "d": d,
            "dmin": dmin,
        }

    def _decode(self, planes: Planes) -> jax.Array:
        scales, minima = self._unpack_scales(planes["scales"])
        scales = multiply_out(planes["d"], scales)
        minima = multiply_out(planes["dmin"], minima)
        codes = join_codes(planes, self.code_bits).astype(jnp.float32)
        # The product has 22 bits at most and is exact: a fused sum rounds as ours.
        scaled = codes * jnp.repeat(scales, self.block_size, axis=-1)
        return scaled - jnp.repeat(minima, self.block_size, axis=-1)

    def _quantize_scales(self, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns int32 scales [..., superblocks, blocks] and their fp16 unit [...,
        superblocks], of fp32 scales [..., blocks of a row] that are not negative."""
        per_superblock = SUPERBLOCK // self.block_size
        scales = scales.reshape(*scales.shape[:-1], -1, per_superblock)
        greatest = jnp.maximum(scales.max(axis=-1), 0)
        rounding = SeparateRounding.of(greatest)
        inverses = jnp.where(greatest > 0, self.highest_scale / greatest, 0)
        scaled = rounding.seal(inverses)[..., None] * scales
        rounding = SeparateRounding.of(scales)
        codes = round_to_integer(rounding.seal(scaled))
        rounding = SeparateRounding.of(greatest)
        unit = greatest / rounding.seal(self.highest_scale)
        codes = jnp.minimum(codes & 0xFF, self.highest_scale)
        return codes, unit.astype(jnp.float16)

    def _weigh(self, blocks: jax.Array) -> jax.Array:
        """Returns the weight of each number: the block's root mean square and the
        number's magnitude."""
        rounding = SeparateRounding.of(blocks[0])

        def square(block: jax.Array) -> tuple[jax.Array]:
            return (rounding.multiply(block, block),)

        (square_sums,) = sum_in_order(square, blocks)
        return jnp.sqrt(square_sums / self.block_size) + jnp.abs(blocks)

    def _pack_scales(self, scales: jax.Array, minima: jax.Array) -> jax.Array:
        return pack_six_bit_pairs(scales, minima)

    def _unpack_scales(self, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        return unpack_six_bit_pairs(packed)


class GgmlQ2_K(AffineSuperblocks):
    """2.625 bits a number: 16 blocks of 16, scales and minima of four bits."""

    type_name = "Q2_K"
    code_bits = 2
    block_size = 16
    highest_scale = 15
    search = AffineSearch(3, first=-0.5, step=0.1, last=15, absolute_error=True)
    fields = (
        BlockField("scales", 16),
        code_field(2, 32, SUPERBLOCK),
        *(half_field("d"), half_field("dmin")),
    )

    def _weigh(self, blocks: jax.Array) -> jax.Array:
        return jnp.abs(blocks)

    def _pack_scales(self, scales: jax.Array, minima: jax.Array) -> jax.Array:
        return pack_nibble_pairs(scales, minima)

    def _unpack_scales(self, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        return unpack_nibble_pairs(packed)


class GgmlQ4_K(AffineSuperblocks):
    """4.5 bits a number: 8 blocks of 32, scales and minima of six bits."""

    type_name = "Q4_K"
    code_bits = 4
    block_size = 32
    highest_scale = 63
    search = AffineSearch(15, first=-1, step=0.1, last=20)
    fields = (
        *(half_field("d"), half_field("dmin")),
        BlockField("scales", 12),
        code_field(4, 32, SUPERBLOCK),
    )


class GgmlQ5_K(AffineSuperblocks):
    """5.5 bits a number: 8 blocks of 32, scales and minima of six bits."""

    type_name = "Q5_K"
    code_bits = 5
    block_size = 32
    highest_scale = 63
    search = AffineSearch(31, first=-0.5, step=0.1, last=15)
    fields = (
        *(half_field("d"), half_field("dmin")),
        BlockField("scales", 12),
        *(code_field(1, 32, SUPERBLOCK), code_field(4, 32, SUPERBLOCK)),
    )
