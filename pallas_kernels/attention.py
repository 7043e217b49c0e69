"""Exact attention: a reference in plain jnp, and a tiled form that any XLA backend compiles.

Shapes: q [B, S, N, H]; k, v [B, T, K, H] with N a multiple of K (grouped queries: query head n
reads kv head n // (N / K)). Query s sits at position ``q_positions[b, s]`` (default s), key t at t.
"""

import math

import jax
import jax.numpy as jnp

# Finite, so that rows with every key masked give no NaN on the way to their zeros.
MASKED = -1e30
QUERY_BLOCK = 128


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} kv heads")


def _attend(q, k, v, mask, scale):
    """q [B, s, K, G, H], k and v [B, T, K, H], mask [B or 1, s, T] → [B, s, K, G, H]."""
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * scale, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(scores > MASKED / 2, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights /= jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bkgst,btkh->bskgh", weights.astype(v.dtype), v)


def _mask(q_positions, k_positions, q_segments, k_segments, causal):
    mask = jnp.ones((1, q_positions.shape[-1], k_positions.shape[-1]), bool)
    if causal:
        mask = q_positions[..., :, None] >= k_positions[..., None, :]
    if q_segments is not None:
        mask &= (q_segments[..., :, None] == k_segments[..., None, :]) & (
            q_segments[..., :, None] != 0
        )
    return mask


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    q_positions: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(q·kᵀ·scale + mask)·v, softmax in fp32, one block of queries at a time.

    A block of queries reads only the keys up to its own end when the mask is causal and positions
    are the default: 5/8 of the work at 4 blocks, 1/2 in the limit.

    Args:
        q_positions: int [B, S], where the queries stand among the keys (decoding); default 0..S-1.
        segment_ids: int [B, S] and [B, T]; tokens attend within their own segment, 0 is padding.
            A query with no key left gives zeros. Masked keys and values may hold anything finite.
        scale: default H ** -0.5.

    Returns:
        [B, S, N, H] in v's dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(q, k, v)
    (B, S, N, H), (T, K) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(H) if scale is None else scale
    q = q.reshape(B, S, K, N // K, H)
    skip = causal and q_positions is None
    positions = jnp.arange(S)[None] if q_positions is None else q_positions
    q_segments, k_segments = segment_ids if segment_ids is not None else (None, None)

    def block(start: int, stop: int) -> jax.Array:
        end = min(stop, T) if skip else T
        mask = _mask(
            positions[:, start:stop],
            jnp.arange(end)[None],
            None if q_segments is None else q_segments[:, start:stop],
            None if k_segments is None else k_segments[:, :end],
            causal,
        )
        return _attend(q[:, start:stop], k[:, :end], v[:, :end], mask, scale)

    blocks = [block(start, min(start + QUERY_BLOCK, S)) for start in range(0, S, QUERY_BLOCK)]
    return jnp.concatenate(blocks, axis=1).reshape(B, S, N, H)
