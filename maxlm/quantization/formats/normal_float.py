"""NF4: four-bit codes of the quantiles of a normal distribution, and double quantization
(Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3).

Codes are bitsandbytes' (``quantize_4bit``): the nearest of 16 numbers to x / max |x| of
the block, of two equally near ones the lower. With double quantization a block's largest
magnitude, less the mean of all of them, is stored in bitsandbytes' dynamic 8-bit map in
blocks of 256. Its blocks are consecutive in a flat order, which no device's part of a
matrix can have; here they are 256 rows of one block column.
:mod:`maxlm.quantization.formats.flat_normal_float` has the flat order.
"""

import re
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maxlm.quantization.formats.arithmetic import (
    SMALLEST_NORMAL,
    count_below,
    look_up_codes,
)
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

NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The numbers of the codes (QLoRA, appendix E)."""

NESTED_BLOCK = 256
"""Largest magnitudes that share a scale of their own."""

_NAME = re.compile(r"nf4(-g(?P<block>[1-9]\d*))?(?P<double>-double)?")
_KNOWN_NAMES = ("nf4", "nf4-double", "nf4-g128", "nf4-g128-double")


@dataclass(frozen=True)
class NormalFloatFormat(Format):
    """NF4.

    Planes: ``codes4``, packed; ``scales`` [R, C / block]: fp32, or with double
    quantization uint8 codes of the dynamic map, for which ``nested_scales`` fp32
    [ceil(R / 256), C / block] and ``scale_offset`` fp32 [1, 1] stand beside.

    Args:
        block: columns that share a scale.
        double: scales are themselves quantized.
    """

    block: int = 64
    double: bool = False

    @property
    def name(self) -> str:
        block = "" if self.block == 64 else f"-g{self.block}"
        return f"nf4{block}{'-double' if self.double else ''}"

    @property
    def scale_block(self) -> BlockSize:
        """Rows and columns that share a scale."""
        return 1, self.block

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale; with double quantization the rows that
        share a nested scale, of which the last may be fewer."""
        rows = NESTED_BLOCK if self.double else 1
        return rows, self._columns

    @property
    def _columns(self) -> int:
        return int(np.lcm(self.block, PACK))

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        check_whole_blocks(self.name, rows, columns, self._columns)
        planes = describe_code_planes(4, rows, columns)
        column_blocks = columns // self.block
        if not self.double:
            return {**planes, "scales": PlaneSpec(rows, column_blocks, "float32")}
        nested = count_blocks(rows, column_blocks, (NESTED_BLOCK, 1))
        return {
            **planes,
            "scales": PlaneSpec(rows, column_blocks, "uint8"),
            "nested_scales": PlaneSpec(*nested, "float32"),
            "scale_offset": PlaneSpec(1, 1, "float32"),
        }

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        maxima = jnp.abs(split_blocks(values, self.scale_block)).max(-1)
        # As bitsandbytes does: a reciprocal, and one product a number. The codes are
        # those of the scales before they are quantized.
        factors = spread_over_blocks(
            1 / jnp.maximum(maxima, SMALLEST_NORMAL), self.scale_block, rows, columns
        )
        codes = count_below(values * factors, find_midpoints(NF4_CODES))
        planes = split_codes(codes, 4)
        if not self.double:
            return {**planes, "scales": maxima}
        offset = maxima.mean((-2, -1), keepdims=True)
        centred = maxima - offset
        blocks = split_blocks(centred, (NESTED_BLOCK, 1))
        nested_scales = jnp.abs(blocks).max(-1)
        scale_codes = _encode_dynamic(centred, nested_scales)
        return {
            **planes,
            "scales": scale_codes,
            "nested_scales": nested_scales,
            "scale_offset": offset,
        }

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        numbers = look_up_codes(join_codes(planes, 4), NF4_CODES)
        rows, columns = numbers.shape[-2:]
        scales = self.decode_scales(planes)
        spread = spread_over_blocks(scales, self.scale_block, rows, columns)
        return (numbers * spread).astype(dtype)

    def decode_scales(self, planes: Planes) -> jax.Array:
        """Returns the fp32 scales [..., R, C / block]."""
        scales = planes["scales"]
        if not self.double:
            return scales
        rows, column_blocks = scales.shape[-2:]
        nested = spread_over_blocks(
            planes["nested_scales"], (NESTED_BLOCK, 1), rows, column_blocks
        )
        dynamic = jnp.asarray(compute_dynamic_map())[scales]
        return dynamic * nested + planes["scale_offset"]


@cache
def compute_dynamic_map() -> np.ndarray:
    """Returns the 256 fp32 numbers of bitsandbytes' signed dynamic map, ascending.

    Exponents 10^-6 .. 1 have 1, 2, .. 64 fractions each, the middles of equal parts of
    .1 .. 1, of either sign; 0 and 1 are the other two (Dettmers 2016, arXiv 1511.04561,
    section 2). bitsandbytes' own numbers differ by up to a unit in the last place with
    the machine that computed them; its files carry them.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        fractions = 2**exponent
        middles = 0.1 + 0.9 * (np.arange(fractions) + 0.5) / fractions
        magnitudes = middles * 10.0 ** (exponent - 6)
        numbers += [*magnitudes, *-magnitudes]
    return np.sort(numbers).astype(np.float32)


def find_midpoints(numbers: tuple[float, ...] | np.ndarray) -> np.ndarray:
    """Returns the fp32 middles of consecutive ascending numbers."""
    ascending = np.asarray(numbers, np.float32)
    return (ascending[:-1] + ascending[1:]) / np.float32(2)


def read_normal_float_format(name: str) -> NormalFloatFormat:
    """Returns the format of a name ``nf4-g128-double``: blocks of 128 columns, else 64,
    with double quantization or without. Raises MaxlmError, with near names."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise build_name_error(name, _KNOWN_NAMES)
    block = int(match["block"] or 64)
    return NormalFloatFormat(block, bool(match["double"]))


def _encode_dynamic(centred: jax.Array, nested_scales: jax.Array) -> jax.Array:
    """Returns uint8 codes of the dynamic map [..., R, blocks] of magnitudes."""
    rows, column_blocks = centred.shape[-2:]
    factors = 1 / jnp.maximum(nested_scales, SMALLEST_NORMAL)
    block = (NESTED_BLOCK, 1)
    scaled = centred * spread_over_blocks(factors, block, rows, column_blocks)
    bounds = jnp.asarray(find_midpoints(compute_dynamic_map()))
    return jnp.searchsorted(bounds, scaled).astype(jnp.uint8)
