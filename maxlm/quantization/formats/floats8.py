"""FP8: floating-point numbers of eight bits, E4M3 and E5M2 (Micikevicius et al. 2022,
arXiv 2209.05433), with fp32 scales of matrices, rows, groups and square blocks."""

import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.quantization.formats.arithmetic import divide_exactly
from maxlm.quantization.formats.blocks import (
    BlockSize,
    check_whole_blocks,
    count_blocks,
    split_blocks,
    spread_over_blocks,
)
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.names import build_name_error
from maxlm.quantization.formats.power_scales import round_up_to_power

Float8 = Literal["e4m3", "e5m2"]

FLOAT8_DTYPES: dict[Float8, DTypeLike] = {
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
}

_KIND_NAMES: dict[Float8, str] = {"e4m3": "fp8", "e5m2": "fp8e5m2"}
_ENDINGS = ("", "-tensor", "-g128", "-b128", "-b128-ue8m0")
_NAME = re.compile(
    r"(?P<kind>fp8|fp8e5m2)"
    r"(?P<tensor>-tensor)?(-g(?P<group>[1-9]\d*))?(-b(?P<block>[1-9]\d*))?"
    r"(?P<power>-ue8m0)?"
)


@dataclass(frozen=True)
class Float8Format(Format):
    """FP8 with a scale a block.

    Planes: ``codes``, the numbers [R, C] in their own type; ``scales`` fp32. Blocks of
    several rows may be cut off at the edges of a matrix, as in DeepSeek's files: scales
    [ceil(R / 128), ceil(C / 128)].

    Args:
        kind: ``e4m3`` (largest 448) or ``e5m2`` (57,344).
        block: rows and columns that share a scale; None: all. (1, None): rows.
        power_of_two: scales are rounded up to powers of two (UE8M0).
    """

    kind: Float8 = "e4m3"
    block: BlockSize = (1, None)
    power_of_two: bool = False

    @property
    def name(self) -> str:
        rows, columns = self.block
        if columns is None:
            block = "-tensor" if rows is None else ""
        else:
            block = f"-g{columns}" if rows == 1 else f"-b{columns}"
        power = "-ue8m0" if self.power_of_two else ""
        return f"{_KIND_NAMES[self.kind]}{block}{power}"

    @property
    def scale_block(self) -> BlockSize:
        """Rows and columns that share a scale."""
        return self.block

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale; a scale of a whole row or matrix asks
        for no number of them: all devices' parts share it."""
        rows, columns = self.block
        return rows or 1, columns or 1

    @property
    def dtype(self) -> DTypeLike:
        """The type of the numbers."""
        return FLOAT8_DTYPES[self.kind]

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        block_rows, block_columns = self.block
        if block_rows == 1:
            check_whole_blocks(self.name, rows, columns, block_columns or columns)
        blocks = count_blocks(rows, columns, self.block)
        return {
            "codes": PlaneSpec(rows, columns, self.dtype),
            "scales": PlaneSpec(*blocks, "float32"),
        }

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        maxima = jnp.abs(split_blocks(values, self.block)).max(-1)
        scales = self.compute_scales(maxima)
        spread = spread_over_blocks(scales, self.block, rows, columns)
        codes = cast_to_float8(divide_exactly(values, spread), self.kind)
        return {"codes": codes, "scales": scales}

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        codes = planes["codes"]
        rows, columns = codes.shape[-2:]
        scales = spread_over_blocks(planes["scales"], self.block, rows, columns)
        return (codes.astype(jnp.float32) * scales).astype(dtype)

    def compute_scales(self, maxima: jax.Array) -> jax.Array:
        """Returns the fp32 scales of blocks whose largest magnitudes these are: the
        largest becomes the largest number. Zeros have fp32's epsilon as their scale, as
        in compressed-tensors."""
        limits = jnp.finfo(self.dtype)
        scales = divide_exactly(maxima.astype(jnp.float32), float(limits.max))
        if self.power_of_two:
            scales = round_up_to_power(scales)
        is_zero = scales < jnp.finfo(jnp.float32).tiny
        return jnp.where(is_zero, jnp.finfo(jnp.float32).eps, scales)


def cast_to_float8(values: jax.Array, kind: Float8) -> jax.Array:
    """Returns values in FP8, rounded to nearest, half to even; what is too large
    becomes the largest number."""
    dtype = FLOAT8_DTYPES[kind]
    largest = float(jnp.finfo(dtype).max)
    # A cast alone makes it NaN (E4M3) or infinity (E5M2).
    return jnp.clip(values, -largest, largest).astype(dtype)


def read_float8_format(name: str) -> Float8Format:
    """Returns the format of a name ``fp8-b128``: ``fp8`` (E4M3) or ``fp8e5m2``; one
    scale a matrix (``tensor``), group of columns (``g``) or square block (``b``), else
    a row; ``ue8m0``: powers of two. Raises MaxlmError, with near names."""
    match = _NAME.fullmatch(name)
    blocks: dict[str, BlockSize] = {}
    if match is not None:
        if match["tensor"]:
            blocks["tensor"] = (None, None)
        if match["group"]:
            blocks["group"] = (1, int(match["group"]))
        if match["block"]:
            blocks["block"] = (int(match["block"]), int(match["block"]))
    if match is None or len(blocks) > 1:
        known = [kind + end for kind in _KIND_NAMES.values() for end in _ENDINGS]
        raise build_name_error(name, known)
    block = next(iter(blocks.values()), (1, None))
    kinds: dict[str, Float8] = {
        kind_name: kind for kind, kind_name in _KIND_NAMES.items()
    }
    return Float8Format(kinds[match["kind"]], block, bool(match["power"]))
