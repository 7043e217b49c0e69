"""Codes of up to eight bits as the arrays of a quantized matrix.

Arrays of packed codes are named by their width, ``codes4`` and ``codes2`` for six bits;
``codes`` has one code an item.
"""

import jax

from maxlm.quantization.formats.format import Planes, PlaneSpec
from maxlm.quantization.formats.packing import (
    list_packed_widths,
    pack_codes,
    unpack_codes,
)


def describe_code_planes(bits: int, rows: int, columns: int) -> dict[str, PlaneSpec]:
    """Returns the arrays of packed codes of ``bits``, fewer than eight; ``columns`` a
    multiple of 32."""
    return {
        f"codes{width}": PlaneSpec(rows, columns * width // 8, "uint8")
        for width in list_packed_widths(bits)
    }


def split_codes(codes: jax.Array, bits: int) -> dict[str, jax.Array]:
    """Packs uint8 codes [..., R, C] below 2^bits into these arrays."""
    planes = {}
    low = 0
    for width in list_packed_widths(bits):
        part = (codes >> low) & ((1 << width) - 1)
        planes[f"codes{width}"] = pack_codes(part, width)
        low += width
    return planes


def join_codes(planes: Planes, bits: int) -> jax.Array:
    """Returns uint8 codes [..., R, C]; inverts :func:`split_codes`."""
    parts = []
    low = 0
    for width in list_packed_widths(bits):
        part = unpack_codes(planes[f"codes{width}"], width)
        parts.append(part << low)
        low += width
    codes = parts[0]
    for part in parts[1:]:
        codes = codes | part
    return codes
