"""Blocks of queries and of keys judged by the least and the greatest segment in them."""

import jax
import jax.numpy as jnp

_FAR = 2**30


def compare_block_segments(
    q_segments: jax.Array, k_segments: jax.Array, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """bool [B, blocks of queries, blocks of keys]: whether they may have a segment in common; and
    whether all of their tokens are of one. Past the last token, both are as if it went on."""
    q_least, q_low, q_high = (x[:, :, None] for x in _bounds(q_segments, block_q))
    k_least, k_low, k_high = (x[:, None] for x in _bounds(k_segments, block_k))
    one = (q_least == q_high) & (k_least == k_high) & (q_high == k_high) & (k_least > 0)
    return (q_low <= k_high) & (k_low <= q_high), one


def split_into_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, n] → [B, blocks, size], the last value repeated."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge")
    return x.reshape(x.shape[0], -1, size)


def _bounds(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each block's least segment, least that is not padding, and greatest."""
    cut = split_into_blocks(segments, size)
    real = jnp.where(cut > 0, cut, _FAR)
    return cut.min(axis=2), real.min(axis=2), cut.max(axis=2)
