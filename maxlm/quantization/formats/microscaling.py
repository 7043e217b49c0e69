"""MX formats: floats of eight or four bits in blocks of 32 with a power of two as their
scale (Open Compute Project, Microscaling Formats v1.0)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
    FLOAT4_LARGEST_EXPONENT,
    FLOAT4_MANTISSA_BITS,
    decode_float4,
    encode_float4,
)
from maxlm.quantization.formats.floats8 import FLOAT8_DTYPES, cast_to_float8
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.names import build_name_error
from maxlm.quantization.formats.power_scales import (
    SCALE_RULES,
    ScaleRule,
    compute_scale_exponents,
    decode_exponents,
)

Element = Literal["e4m3", "e5m2", "e2m1"]

BLOCK = 32
"""Columns that share a scale."""


@dataclass(frozen=True)
class ElementLimits:
    """The largest number of an element type, its exponent, and the mantissa bits."""

    largest: float
    largest_exponent: int
    mantissa_bits: int


ELEMENT_LIMITS: Mapping[Element, ElementLimits] = {
    "e4m3": ElementLimits(448.0, 8, 3),
    "e5m2": ElementLimits(57344.0, 15, 2),
    "e2m1": ElementLimits(
        FLOAT4_LARGEST, FLOAT4_LARGEST_EXPONENT, FLOAT4_MANTISSA_BITS
    ),
}

_KIND_NAMES: dict[Element, str] = {
    "e4m3": "mxfp8",
    "e5m2": "mxfp8e5m2",
    "e2m1": "mxfp4",
}
_NAME = re.compile(r"(?P<kind>mxfp8|mxfp8e5m2|mxfp4)(-(?P<rule>rceil|even|ceil))?")


@dataclass(frozen=True)
class MicroscalingFormat(Format):
    """MXFP8 or MXFP4.

    Planes: ``codes``, FP8 numbers [R, C], or ``codes4``, packed E2M1; ``scales`` uint8
    [R, C / 32], biased exponents (E8M0).

    Args:
        element: ``e4m3``, ``e5m2`` (MXFP8) or ``e2m1`` (MXFP4).
        scale_rule: how a block's scale follows from its largest magnitude, see
            :data:`~maxlm.quantization.formats.power_scales.ScaleRule`.
    """

    element: Element = "e4m3"
    scale_rule: ScaleRule = "floor"

    @property
    def name(self) -> str:
        rule = "" if self.scale_rule == "floor" else f"-{self.scale_rule}"
        return f"{_KIND_NAMES[self.element]}{rule}"

    @property
    def scale_block(self) -> BlockSize:
        """Rows and columns that share a scale."""
        return 1, BLOCK

    @property
    def block_shape(self) -> tuple[int, int]:
        return 1, BLOCK

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        check_whole_blocks(self.name, rows, columns, BLOCK)
        if self.element == "e2m1":
            planes = describe_code_planes(4, rows, columns)
        else:
            planes = {"codes": PlaneSpec(rows, columns, FLOAT8_DTYPES[self.element])}
        planes["scales"] = PlaneSpec(rows, columns // BLOCK, "uint8")
        return planes

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        maxima = jnp.abs(split_blocks(values, self.scale_block)).max(-1)
        exponents = self.compute_scales(maxima)
        # 2^-127 of a block of zeros is no normal number: divide by one instead.
        scales = jnp.where(exponents == 0, 1, decode_exponents(exponents))
        scaled = values / spread_over_blocks(scales, self.scale_block, rows, columns)
        if self.element == "e2m1":
            planes = split_codes(encode_float4(scaled), 4)
        else:
            planes = {"codes": cast_to_float8(scaled, self.element)}
        return {**planes, "scales": exponents}

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        if self.element == "e2m1":
            numbers = decode_float4(join_codes(planes, 4))
        else:
            numbers = planes["codes"].astype(jnp.float32)
        rows, columns = numbers.shape[-2:]
        scales = decode_exponents(planes["scales"])
        spread = spread_over_blocks(scales, self.scale_block, rows, columns)
        return (numbers * spread).astype(dtype)

    def compute_scales(self, maxima: jax.Array) -> jax.Array:
        """Returns the uint8 biased exponents of blocks of these largest magnitudes."""
        limits = ELEMENT_LIMITS[self.element]
        return compute_scale_exponents(
            maxima,
            self.scale_rule,
            limits.largest,
            limits.largest_exponent,
            limits.mantissa_bits,
        )


def read_microscaling_format(name: str) -> MicroscalingFormat:
    """Returns the format of a name ``mxfp4-even``: ``mxfp8`` (E4M3), ``mxfp8e5m2`` or
    ``mxfp4``, and the rule of scales, else floor. Raises MaxlmError, with near
    names."""
    match = _NAME.fullmatch(name)
    if match is None:
        endings = ["", *(f"-{rule}" for rule in SCALE_RULES if rule != "floor")]
        known = [kind + end for kind in _KIND_NAMES.values() for end in endings]
        raise build_name_error(name, known)
    elements: dict[str, Element] = {
        kind_name: element for element, kind_name in _KIND_NAMES.items()
    }
    rules: dict[str, ScaleRule] = {rule: rule for rule in SCALE_RULES}
    return MicroscalingFormat(elements[match["kind"]], rules[match["rule"] or "floor"])
