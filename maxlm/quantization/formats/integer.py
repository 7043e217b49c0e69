"""Integers of two to eight bits with scales of rows, groups and square blocks.

Ranges and scales are those of compressed-tensors 0.20 (``calculate_qparams``): codes
-2^(b-1) .. 2^(b-1) - 1, and

- symmetric: scale = max |x| / (2^b - 1) · 2, value = scale · code,
- asymmetric: scale = (max - min) / (2^b - 1) with zero inside the range, zero point
  -2^(b-1) - min / scale, value = scale · (code - zero point).

Zero points and codes are rounded to nearest, half to even: zero points by the scale in
fp32, codes by the scale as it is stored. A scale of zero becomes the epsilon of its
type.
"""

import re
from dataclasses import dataclass
from math import lcm
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.quantization.formats.arithmetic import SMALLEST_NORMAL, divide_exactly
from maxlm.quantization.formats.blocks import (
    BlockSize,
    check_whole_blocks,
    count_blocks,
    split_blocks,
    spread_over_blocks,
)
from maxlm.quantization.formats.code_planes import (
    describe_code_planes,
    join_codes,
    split_codes,
)
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.names import build_name_error
from maxlm.quantization.formats.packing import PACK

ScaleDtype = Literal["bfloat16", "float16", "float32"]

_DTYPE_ENDINGS: dict[ScaleDtype, str] = {
    "bfloat16": "",
    "float16": "-f16",
    "float32": "-f32",
}
_KNOWN_NAMES = (
    "int8",
    "int8-asym",
    "int8-g128",
    "int8-b128",
    "int4",
    "int4-g32",
    "int4-g128",
    "int4-g32-asym",
    "int4-g128-asym",
    "int3-g32",
    "int2-g32",
)
_NAME = re.compile(
    r"int(?P<bits>[2-8])"
    r"(-g(?P<group>[1-9]\d*)|-b(?P<rows>[1-9]\d*)(x(?P<columns>[1-9]\d*))?)?"
    r"(?P<asymmetric>-asym)?(?P<dtype>-f16|-f32)?"
)


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Integers whose blocks share a scale, and a zero point if they are asymmetric.

    Planes: ``codes`` int8 [R, C] of eight bits, else ``codes4``, ``codes2``, ``codes1``
    with 2^(b-1) added to each code; ``scales``; ``zeros`` int8.

    Args:
        bits: of a code, 2 to 8.
        group: columns that share a scale; None: all of a row.
        symmetric: without zero points.
        block_rows: rows that share a scale; blocks of several may be cut off at the
            edges of a matrix.
        scale_dtype: what scales are stored in: ``bfloat16``, ``float16``, ``float32``.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    block_rows: int = 1
    scale_dtype: ScaleDtype = "bfloat16"

    @property
    def name(self) -> str:
        if self.block_rows > 1:
            is_square = self.block_rows == self.group
            columns = "" if is_square else f"x{self.group}"
            block = f"-b{self.block_rows}{columns}"
        else:
            block = "" if self.group is None else f"-g{self.group}"
        asymmetric = "" if self.symmetric else "-asym"
        return f"int{self.bits}{block}{asymmetric}{_DTYPE_ENDINGS[self.scale_dtype]}"

    @property
    def scale_block(self) -> BlockSize:
        """Rows and columns that share a scale."""
        return self.block_rows, self.group

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale or a byte. A scale of a whole row asks
        for no number of columns: all devices' parts of the row share it."""
        columns = self.group or 1
        if self.bits < 8:
            columns = lcm(columns, PACK)
        return self.block_rows, columns

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        if self.bits < 8:
            check_whole_blocks(self.name, rows, columns, self.block_shape[1])
            planes = describe_code_planes(self.bits, rows, columns)
        else:
            if self.block_rows == 1:
                check_whole_blocks(self.name, rows, columns, self.group or columns)
            planes = {"codes": PlaneSpec(rows, columns, "int8")}
        blocks = count_blocks(rows, columns, self.scale_block)
        planes["scales"] = PlaneSpec(*blocks, self.scale_dtype)
        if not self.symmetric:
            planes["zeros"] = PlaneSpec(*blocks, "int8")
        return planes

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        scales, zeros = self.compute_scales(split_blocks(values, self.scale_block))
        spread_scales, spread_zeros = self._spread(scales, zeros, rows, columns)
        codes = self.round_to_codes(values, spread_scales, spread_zeros)
        return self.pack(codes, scales, zeros)

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        codes = self.unpack(planes)
        rows, columns = codes.shape[-2:]
        zeros = None if self.symmetric else planes["zeros"]
        scales, zeros = self._spread(planes["scales"], zeros, rows, columns)
        return self.decode_codes(codes, scales, zeros).astype(dtype)

    def compute_scales(self, blocks: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scales [...], in the type that they are stored in, and int8 zero
        points [...] of blocks [..., n]; None: codes are symmetric."""
        steps = (1 << self.bits) - 1
        smallest_code, largest_code = self.code_range
        blocks = blocks.astype(jnp.float32)
        if self.symmetric:
            maxima = jnp.abs(blocks).max(-1)
            return self._round_scales(divide_exactly(maxima, steps / 2)), None
        minima = jnp.minimum(blocks.min(-1), 0)
        maxima = jnp.maximum(blocks.max(-1), 0)
        exact_scales = divide_exactly(maxima - minima, float(steps))
        is_empty = exact_scales < SMALLEST_NORMAL
        below_zero = divide_exactly(minima, jnp.where(is_empty, 1, exact_scales))
        zeros = jnp.clip(smallest_code - below_zero, smallest_code, largest_code)
        # A block of zeros has any zero point; compressed-tensors gives it 0.
        zeros = jnp.where(is_empty, 0, jnp.round(zeros))
        scales = self._round_scales(exact_scales)
        return scales, zeros.astype(jnp.int8)

    def round_to_codes(
        self, values: jax.Array, scales: jax.Array, zeros: jax.Array | None = None
    ) -> jax.Array:
        """Returns the int8 codes of values, with scales and zero points that broadcast
        against them."""
        values = values.astype(jnp.float32)
        codes = divide_exactly(values, scales.astype(jnp.float32))
        if zeros is not None:
            codes = codes + zeros.astype(jnp.float32)
        return jnp.round(jnp.clip(codes, *self.code_range)).astype(jnp.int8)

    def decode_codes(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None = None
    ) -> jax.Array:
        """Returns the fp32 values of int8 codes, with scales and zero points that
        broadcast against them."""
        levels = codes.astype(jnp.float32)
        if zeros is not None:
            levels = levels - zeros.astype(jnp.float32)
        return levels * scales.astype(jnp.float32)

    def pack(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None = None
    ) -> Planes:
        """Returns the planes of int8 codes [..., R, C] and scales and zero points of
        blocks, [..., blocks in R, blocks in C]."""
        if self.bits == 8:
            planes = {"codes": codes.astype(jnp.int8)}
        else:
            raised = codes - self.code_range[0]
            planes = split_codes(raised.astype(jnp.uint8), self.bits)
        planes["scales"] = scales.astype(self.scale_dtype)
        if zeros is not None:
            planes["zeros"] = zeros.astype(jnp.int8)
        return planes

    def unpack(self, planes: Planes) -> jax.Array:
        """Returns the int8 codes [..., R, C]."""
        if self.bits == 8:
            return planes["codes"]
        codes = join_codes(planes, self.bits).astype(jnp.int8)
        return codes + jnp.int8(self.code_range[0])

    def _round_scales(self, scales: jax.Array) -> jax.Array:
        limits = jnp.finfo(self.scale_dtype)
        rounded = jnp.minimum(scales, limits.max).astype(self.scale_dtype)
        return jnp.where(rounded == 0, limits.eps, rounded)

    def _spread(
        self, scales: jax.Array, zeros: jax.Array | None, rows: int, columns: int
    ) -> tuple[jax.Array, jax.Array | None]:
        block = self.scale_block
        spread_scales = spread_over_blocks(scales, block, rows, columns)
        if zeros is None:
            return spread_scales, None
        return spread_scales, spread_over_blocks(zeros, block, rows, columns)


def read_integer_format(name: str) -> IntegerFormat:
    """Returns the format of a name ``int4-g32-asym``: bits; a group of columns (``g``)
    or a square block (``b``, ``b64x128``), else whole rows; ``asym``; scales' type
    (``f16``, ``f32``), else bfloat16. Raises MaxlmError, with near names."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise build_name_error(name, _KNOWN_NAMES)
    rows = match["rows"]
    columns = match["columns"] or rows or match["group"]
    dtypes: dict[str, ScaleDtype] = {
        ending: dtype for dtype, ending in _DTYPE_ENDINGS.items()
    }
    return IntegerFormat(
        bits=int(match["bits"]),
        group=int(columns) if columns else None,
        symmetric=not match["asymmetric"],
        block_rows=int(rows) if rows else 1,
        scale_dtype=dtypes[match["dtype"] or ""],
    )
