"""NVFP4: FP4 E2M1 in blocks of 16 with E4M3 scales, and mostly one fp32 scale a matrix
(NVIDIA 2025, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.quantization.formats.arithmetic import SMALLEST_NORMAL, divide_exactly
from maxlm.quantization.formats.blocks import (
    BlockSize,
    check_whole_blocks,
    split_blocks,
    spread_over_blocks,
)
from maxlm.quantization.formats.code_planes import (
    describe_code_planes,
    join_codes,
    split_codes,
)
from maxlm.quantization.formats.float4 import (
    FLOAT4_LARGEST,
    decode_float4,
    encode_float4,
)
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.names import build_name_error
from maxlm.quantization.formats.packing import PACK

BLOCK = 16
"""Columns that share a scale."""

_LARGEST_SCALE = 448.0
_SMALLEST_SCALE = 2.0**-6
"""The smallest normal number of E4M3, and so the smallest scale, as in torchao."""


@dataclass(frozen=True)
class Nvfp4Format(Format):
    """NVFP4.

    Planes: ``codes4``, packed E2M1; ``scales`` E4M3 [R, C / 16]; with two levels
    ``matrix_scale`` fp32 [1, 1], by which the largest of the scales becomes 448. A
    number is code · scale · matrix scale.

    Args:
        two_level: with a scale of the matrix. Without it the smallest block scale is
            2^-6, and blocks below 6 · 2^-6 = 0.09 lose precision: most weights are.
    """

    two_level: bool = True

    @property
    def name(self) -> str:
        return "nvfp4" if self.two_level else "nvfp4-one"

    @property
    def scale_block(self) -> BlockSize:
        """Rows and columns that share a scale."""
        return 1, BLOCK

    @property
    def block_shape(self) -> tuple[int, int]:
        """One row, and the columns whose codes are packed together: two blocks."""
        return 1, PACK

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        check_whole_blocks(self.name, rows, columns, PACK)
        planes = describe_code_planes(4, rows, columns)
        planes["scales"] = PlaneSpec(rows, columns // BLOCK, jnp.float8_e4m3fn)
        if self.two_level:
            planes["matrix_scale"] = PlaneSpec(1, 1, "float32")
        return planes

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        maxima = jnp.abs(split_blocks(values, self.scale_block)).max(-1)
        planes = {}
        if self.two_level:
            matrix_scale = compute_matrix_scale(values)
            planes["matrix_scale"] = matrix_scale
            scales = compute_block_scales(maxima, matrix_scale)
            # As torchao's kernels compute it: a reciprocal, and one product a number.
            factors = (1 / matrix_scale) / scales.astype(jnp.float32)
        else:
            scales = compute_block_scales(maxima, None)
            factors = 1 / scales.astype(jnp.float32)
        planes["scales"] = scales
        spread = spread_over_blocks(factors, self.scale_block, rows, columns)
        return {**split_codes(encode_float4(values * spread), 4), **planes}

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        numbers = decode_float4(join_codes(planes, 4))
        rows, columns = numbers.shape[-2:]
        scales = planes["scales"].astype(jnp.float32)
        if self.two_level:
            scales = scales * planes["matrix_scale"]
        spread = spread_over_blocks(scales, self.scale_block, rows, columns)
        return (numbers * spread).astype(dtype)


def compute_matrix_scale(values: jax.Array) -> jax.Array:
    """Returns the fp32 scales [..., 1, 1] of matrices [..., R, C]: max |x| / (448 ·
    6); 1 of a matrix of zeros."""
    largest = jnp.abs(values).max((-2, -1), keepdims=True)
    scale = divide_exactly(largest, _LARGEST_SCALE * FLOAT4_LARGEST)
    return jnp.where(scale < SMALLEST_NORMAL, 1, scale)


def compute_block_scales(
    maxima: jax.Array, matrix_scale: jax.Array | None
) -> jax.Array:
    """Returns the E4M3 scales of blocks of these largest magnitudes, relative to the
    matrix scale; None: one level."""
    scales = divide_exactly(maxima, FLOAT4_LARGEST)
    if matrix_scale is not None:
        scales = divide_exactly(scales, matrix_scale)
    clipped = jnp.clip(scales, _SMALLEST_SCALE, _LARGEST_SCALE)
    return clipped.astype(jnp.float8_e4m3fn)


def read_nvfp4_format(name: str) -> Nvfp4Format:
    """Returns the format of ``nvfp4`` (two levels of scales) or ``nvfp4-one``. Raises
    MaxlmError, with near names."""
    formats = {known.name: known for known in (Nvfp4Format(), Nvfp4Format(False))}
    if name not in formats:
        raise build_name_error(name, list(formats))
    return formats[name]
