"""Codes of fewer than eight bits, packed in bytes.

The lengths of codes are sums of 1, 2 and 4 bits, and each of these summands is an array
of bytes of its own: 3 bits are two and one, 6 are four and two. Of every 32 codes along
the last dimension, a byte of an array of w bits holds 8 / w that lie 4 · w apart: of
four bits the codes j and j + 16, the first in its low half. Any run of 32 codes is then
whole bytes, which a product reads as two (four, eight) contiguous runs.
"""

import jax
import jax.numpy as jnp

PACK = 32
"""Codes that are packed together."""


def list_packed_widths(bits: int) -> list[int]:
    """Returns the widths of the arrays that hold codes of ``bits``, from their low bits
    to their high ones: [4, 2] for 6."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_codes(codes: jax.Array, width: int) -> jax.Array:
    """Packs uint8 codes [..., n] below 2^width, n a multiple of 32, into bytes [..., n ·
    width / 8]; width 1, 2 or 4."""
    per_byte = 8 // width
    groups = codes.reshape(*codes.shape[:-1], -1, per_byte, PACK // per_byte)
    packed = groups[..., 0, :]
    for place in range(1, per_byte):
        packed = packed | (groups[..., place, :] << (place * width)).astype(jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_codes(packed: jax.Array, width: int) -> jax.Array:
    """Returns uint8 codes [..., n]; inverts :func:`pack_codes`."""
    per_byte = 8 // width
    mask = (1 << width) - 1
    groups = packed.reshape(*packed.shape[:-1], -1, 1, PACK // per_byte)
    shifts = jnp.arange(per_byte, dtype=jnp.uint8)[:, None] * width
    codes = (groups >> shifts) & mask
    return codes.astype(jnp.uint8).reshape(*packed.shape[:-1], -1)
