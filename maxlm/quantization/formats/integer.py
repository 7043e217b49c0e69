"""Integers with a scale for each row, group of columns, or block.

Scales follow compressed-tensors (0.20, ``calculate_qparams``), with which files are
exchanged. Of b bits, codes are -2^(b-1) .. 2^(b-1) - 1:

- symmetric: scale = max |x| / ((2^b - 1) / 2), code = round(x / scale);
- asymmetric: scale = (max - min) / (2^b - 1), zero = -2^(b-1) - min / scale rounded, code
  = round(x / scale + zero), with 0 within min .. max.

Codes are stored unsigned, 2^(b-1) added, where they have fewer than eight bits.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.packing import (
    PACK,
    list_packed_widths,
    pack_codes,
    unpack_codes,
)

ScaleDtype = Literal["float32", "bfloat16", "float16"]
_SUFFIXES: dict[str, ScaleDtype] = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
}
EXAMPLES = ("int8", "int8-g128", "int8-b128", "int4-g32", "int4-g128", "int4-g32-asym")


@dataclass(frozen=True)
class IntegerFormat(Format):
    """Integers in blocks of ``block_rows`` rows and ``group`` columns."""

    bits: int = 8
    group: int | None = None
    """Columns that share a scale; None: all of a row."""
    block_rows: int = 1
    """Rows that share a scale."""
    is_symmetric: bool = True
    scale_dtype: ScaleDtype = "float32"

    @property
    def name(self) -> str:
        parts = [f"int{self.bits}"]
        if self.block_rows > 1:
            parts.append(f"b{self.block_rows}")
        elif self.group is not None:
            parts.append(f"g{self.group}")
        if not self.is_symmetric:
            parts.append("asym")
        if self.scale_dtype != _get_default_scale_dtype(self.group):
            suffixes = {dtype: suffix for suffix, dtype in _SUFFIXES.items()}
            parts.append(suffixes[self.scale_dtype])
        return "-".join(parts)

    @property
    def block_shape(self) -> tuple[int, int]:
        columns = 1 if self.group is None else self.group
        if self.bits < 8:
            columns = max(columns, PACK)
        return self.block_rows, columns

    @property
    def lowest(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        block_rows, block_columns = self.block_shape
        group = columns if self.group is None else self.group
        if rows % block_rows or columns % block_columns or columns % group:
            message = f"a matrix of {rows} x {columns} is no whole number of blocks of "
            message += f"{block_rows} x {max(block_columns, self.group or 1)}"
            raise MaxlmError(
                message, fix="use a format with other blocks, such as int8"
            )
        planes = {}
        if self.bits == 8:
            planes["codes"] = PlaneSpec(rows, columns, jnp.int8)
        else:
            for width in list_packed_widths(self.bits):
                planes[f"codes{width}"] = PlaneSpec(
                    rows, columns * width // 8, jnp.uint8
                )
        counts = rows // block_rows, columns // group
        planes["scales"] = PlaneSpec(*counts, jnp.dtype(self.scale_dtype))
        if not self.is_symmetric:
            planes["zeros"] = PlaneSpec(*counts, jnp.int8)
        return planes

    def encode(self, values: jax.Array) -> Planes:
        blocks = self.split_blocks(values)
        # [..., R / r, r, C / c, c] → [..., R / r, C / c, r · c]
        by_block = jnp.swapaxes(blocks, -3, -2)
        by_block = by_block.reshape(*by_block.shape[:-2], -1)
        scales, zeros = self.compute_scales(by_block)
        codes = self.round_to_codes(
            blocks, _spread(scales), None if zeros is None else _spread(zeros)
        )
        return self.pack(codes.reshape(values.shape), scales, zeros)

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        codes = self.unpack(planes)
        zeros = planes.get("zeros")
        blocks = self.split_blocks(codes)
        values = self.decode_codes(
            blocks,
            _spread(planes["scales"]),
            None if zeros is None else _spread(zeros),
        )
        return values.reshape(codes.shape).astype(dtype)

    def compute_scales(self, blocks: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scales, in their dtype, and zeros, int8, of fp32 blocks [..., n]:
        [...] each; no zeros where the format is symmetric."""
        low = jnp.minimum(blocks.min(-1), 0)
        high = jnp.maximum(blocks.max(-1), 0)
        num_steps = 2**self.bits - 1
        # Not a product with the reciprocal, to which a compiler turns a division by a
        # constant: that rounds otherwise.
        if self.is_symmetric:
            half = jax.lax.optimization_barrier(jnp.float32(num_steps / 2))
            scales = jnp.maximum(high, -low) / half
        else:
            steps = jax.lax.optimization_barrier(jnp.float32(num_steps))
            scales = (high - low) / steps
        dtype = jnp.dtype(self.scale_dtype)
        scales = scales.astype(dtype)
        scales = jnp.where(scales == 0, jnp.finfo(dtype).eps, scales)
        if self.is_symmetric:
            return scales, None
        zeros = self.lowest - low / scales.astype(jnp.float32)
        zeros = jnp.clip(jnp.round(zeros), self.lowest, self.highest)
        return scales, zeros.astype(jnp.int8)

    def round_to_codes(
        self, values: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        """Returns the nearest codes, int8, of values, with scales and zeros that
        broadcast against them."""
        steps = values / scales.astype(jnp.float32)
        if zeros is not None:
            steps = steps + zeros.astype(jnp.float32)
        codes = jnp.clip(jnp.round(steps), self.lowest, self.highest)
        return codes.astype(jnp.int8)

    def decode_codes(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        """Returns the fp32 values of codes int8, with scales and zeros that broadcast
        against them."""
        steps = codes.astype(jnp.float32)
        if zeros is not None:
            steps = steps - zeros.astype(jnp.float32)
        return steps * scales.astype(jnp.float32)

    def pack(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> Planes:
        """Returns the planes of codes int8 [..., R, C], scales and zeros [..., R / r, C
        / c]."""
        planes: dict[str, jax.Array] = {}
        if self.bits == 8:
            planes["codes"] = codes
        else:
            unsigned = (codes - self.lowest).astype(jnp.uint8)
            start = 0
            for width in list_packed_widths(self.bits):
                part = (unsigned >> start) & ((1 << width) - 1)
                planes[f"codes{width}"] = pack_codes(part, width)
                start += width
        planes["scales"] = scales
        if zeros is not None:
            planes["zeros"] = zeros
        return planes

    def unpack(self, planes: Planes) -> jax.Array:
        """Returns the codes int8 [..., R, C]."""
        if self.bits == 8:
            return planes["codes"]
        unsigned: jax.Array | None = None
        start = 0
        for width in list_packed_widths(self.bits):
            part = unpack_codes(planes[f"codes{width}"], width) << start
            unsigned = part if unsigned is None else unsigned | part
            start += width
        assert unsigned is not None
        return (unsigned.astype(jnp.int8) + self.lowest).astype(jnp.int8)

    def split_blocks(self, values: jax.Array) -> jax.Array:
        """Returns [..., R, C] as [..., R / r, r, C / c, c]."""
        *lead, rows, columns = values.shape
        group = columns if self.group is None else self.group
        return values.reshape(
            *lead, rows // self.block_rows, self.block_rows, columns // group, group
        )


def parse_integer_format(name: str) -> IntegerFormat:
    """Returns the format of a name such as ``int4-g32-asym``. Raises MaxlmError."""
    kind, *parts = name.split("-")
    bits = kind.removeprefix("int")
    if not (bits.isdigit() and 2 <= int(bits) <= 8):
        raise _unknown(name)
    group: int | None = None
    block_rows = 1
    is_symmetric = True
    scale_dtype: ScaleDtype | None = None
    for part in parts:
        size = part[1:]
        if part[:1] == "g" and size.isdigit() and int(size):
            group = int(size)
        elif part[:1] == "b" and size.isdigit() and int(size):
            group = int(size)
            block_rows = int(size)
        elif part == "asym":
            is_symmetric = False
        elif part in _SUFFIXES:
            scale_dtype = _SUFFIXES[part]
        else:
            raise _unknown(name)
    if scale_dtype is None:
        scale_dtype = _get_default_scale_dtype(group)
    return IntegerFormat(int(bits), group, block_rows, is_symmetric, scale_dtype)


def _get_default_scale_dtype(group: int | None) -> ScaleDtype:
    """A row's scale is a small part of it; a group's is not."""
    return "float32" if group is None else "bfloat16"


def _spread(scales: jax.Array) -> jax.Array:
    """Returns [..., R / r, C / c] as [..., R / r, 1, C / c, 1], which broadcasts against
    blocks."""
    return scales[..., :, None, :, None]


def _unknown(name: str) -> MaxlmError:
    fix = f"use one such as {', '.join(EXAMPLES)}"
    return MaxlmError(f"no weight format {name!r}", where="format", fix=fix)
