"""The scales of a superblock's blocks, packed as GGML packs them.

Each function takes or returns scales int32 [..., superblocks, blocks of one], and their
bytes uint8 [..., bytes of a row].
"""

import jax
import jax.numpy as jnp


def pack_six_bit_pairs(scales: jax.Array, minima: jax.Array) -> jax.Array:
    """Packs 8 scales and 8 minima of six bits in 12 bytes: the first four scales and
    four minima a byte each, below the two high bits of the last four, whose low bits
    are the last four bytes, the scale's in the low half."""
    high_scales = scales[..., 4:]
    high_minima = minima[..., 4:]
    first = scales[..., :4] | ((high_scales >> 4) << 6)
    second = minima[..., :4] | ((high_minima >> 4) << 6)
    third = (high_scales & 15) | ((high_minima & 15) << 4)
    return _join_bytes([first, second, third])


def unpack_six_bit_pairs(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scales and minima; inverts :func:`pack_six_bit_pairs`."""
    quarters = packed.astype(jnp.int32).reshape(*packed.shape[:-1], -1, 3, 4)
    first = quarters[..., 0, :]
    second = quarters[..., 1, :]
    third = quarters[..., 2, :]
    high_scales = (third & 15) | ((first >> 6) << 4)
    high_minima = (third >> 4) | ((second >> 6) << 4)
    scales = jnp.concatenate([first & 63, high_scales], axis=-1)
    minima = jnp.concatenate([second & 63, high_minima], axis=-1)
    return scales, minima


def pack_nibble_pairs(scales: jax.Array, minima: jax.Array) -> jax.Array:
    """Packs 16 scales and 16 minima of four bits in 16 bytes, scales in low halves."""
    return _join_bytes([scales | (minima << 4)])


def unpack_nibble_pairs(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scales and minima; inverts :func:`pack_nibble_pairs`."""
    pairs = packed.astype(jnp.int32).reshape(*packed.shape[:-1], -1, 16)
    return pairs & 15, pairs >> 4


def pack_six_bit_scales(scales: jax.Array) -> jax.Array:
    """Packs 16 scales of six bits in 12 bytes: eight of the low halves of scales j and
    j + 8, four of the high two bits of j, j + 4, j + 8 and j + 12."""
    low = (scales[..., :8] & 15) | ((scales[..., 8:] & 15) << 4)
    quarters = (scales >> 4).reshape(*scales.shape[:-1], 4, 4)
    high = quarters[..., 0, :]
    for place in range(1, 4):
        high = high | (quarters[..., place, :] << (2 * place))
    return _join_bytes([low, high])


def unpack_six_bit_scales(packed: jax.Array) -> jax.Array:
    """Returns scales; inverts :func:`pack_six_bit_scales`."""
    superblocks = packed.astype(jnp.int32).reshape(*packed.shape[:-1], -1, 12)
    low = superblocks[..., :8]
    low = jnp.concatenate([low & 15, low >> 4], axis=-1)
    high = superblocks[..., 8:]
    high = jnp.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return low | (high << 4)


def _join_bytes(parts: list[jax.Array]) -> jax.Array:
    packed = jnp.concatenate(parts, axis=-1).astype(jnp.uint8)
    return packed.reshape(*packed.shape[:-2], -1)
