"""Exact attention, tiled, in a form that any XLA backend compiles.

Shapes: q [B, S, N, H]; k, v [B, T, K, H] with N a multiple of K (grouped queries: query head n
reads kv head n // (N / K)). Query s sits at position ``q_positions[b, s]`` (default s), key t at t.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that rows with every key masked give no NaN on the way to their zeros.
MASKED = -1e30
MIN_TILE, MAX_TILES = 128, 16


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} kv heads")


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
    """softmax(q·kᵀ·scale + mask)·v, softmax in fp32, a tile of queries at a time.

    A tile of queries reads only the keys up to its own end when the mask is causal and positions
    are the default: 5/8 of the work at 4 tiles, 1/2 in the limit. The backward pass computes the
    weights again, so that nothing of size S × T is kept.

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
    (B, S, N, H), K = q.shape, k.shape[2]
    grouped = q.reshape(B, S, K, N // K, H)
    where = (q_positions, *(segment_ids or (None, None)))
    scale = 1 / math.sqrt(H) if scale is None else scale
    o: Any = _tiled(grouped, k, v, where, causal, scale)
    return o.reshape(B, S, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(q, k, v, where, causal, scale):
    return _forward(q, k, v, where, causal, scale)[0]


def _forward(q, k, v, where, causal, scale):
    """q [B, S, K, G, H] → the output, and what the backward pass needs: O(S) memory."""

    def block(tile: _Tile):
        scores = tile.scores(q, k, where, causal, scale)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = jnp.einsum("bkgst,btkh->bkgsh", weights.astype(v.dtype), v[:, : tile.end])
        some = top > MASKED / 2  # rows with a key left
        o = jnp.where(some, o.astype(jnp.float32) / total, 0.0)
        # +inf where no key is left: then exp(scores − logsumexp) is 0 in the backward pass too.
        return o.astype(v.dtype), jnp.where(some, top + jnp.log(total), jnp.inf)

    tiles = [block(tile) for tile in _tiles(q, k, where, causal)]
    o, logsumexp = (jnp.concatenate(parts, axis=3) for parts in zip(*tiles, strict=True))
    o = o.transpose(0, 3, 1, 2, 4)
    return o, (q, k, v, where, o, logsumexp)


def _backward(causal, scale, saved, d_o):
    """Weights are recomputed from scores and log-sum-exp (Dao et al. 2022, appendix B)."""
    q, k, v, where, o, logsumexp = saved
    delta = jnp.einsum("bskgh,bskgh->bkgs", d_o, o, preferred_element_type=jnp.float32)[..., None]
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

    def whole(part: jax.Array, end: int) -> jax.Array:
        return jnp.pad(part, ((0, 0), (0, k.shape[1] - end), (0, 0), (0, 0)))

    for tile in _tiles(q, k, where, causal):
        rows, end = slice(tile.start, tile.stop), tile.end
        scores = tile.scores(q, k, where, causal, scale)
        weights = jnp.exp(scores - logsumexp[..., rows, :])
        d_weights = jnp.einsum(
            "bskgh,btkh->bkgst", d_o[:, rows], v[:, :end], preferred_element_type=jnp.float32
        )
        d_scores = (weights * (d_weights - delta[..., rows, :]) * scale).astype(q.dtype)
        d_q.append(jnp.einsum("bkgst,btkh->bskgh", d_scores, k[:, :end]))
        into = {"preferred_element_type": jnp.float32}
        d_k += whole(jnp.einsum("bkgst,bskgh->btkh", d_scores, q[:, rows], **into), end)
        weights = weights.astype(d_o.dtype)
        d_v += whole(jnp.einsum("bkgst,bskgh->btkh", weights, d_o[:, rows], **into), end)
    return jnp.concatenate(d_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_tiled.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """Queries [start, stop) and the keys [0, end) that they may see."""

    start: int
    stop: int
    end: int

    def scores(self, q, k, where, causal, scale):
        """fp32 [B, K, G, stop − start, end], MASKED where a query may not see a key."""
        positions, q_segments, k_segments = where
        rows = slice(self.start, self.stop)
        at = jnp.arange(self.start, self.stop)[None] if positions is None else positions[:, rows]
        mask = _mask(
            at,
            jnp.arange(self.end)[None],
            None if q_segments is None else q_segments[:, rows],
            None if k_segments is None else k_segments[:, : self.end],
            causal,
        )
        scores = jnp.einsum(
            "bskgh,btkh->bkgst", q[:, rows], k[:, : self.end], preferred_element_type=jnp.float32
        )
        return jnp.where(mask[:, None, None], scores * scale, MASKED)


def _tiles(q, k, where, causal) -> list[_Tile]:
    """At most MAX_TILES runs of queries: the program grows with their number."""
    S, T = q.shape[1], k.shape[1]
    size = max(MIN_TILE, -(-S // MAX_TILES))
    skip = causal and where[0] is None
    bounds = [(start, min(start + size, S)) for start in range(0, S, size)]
    return [_Tile(start, stop, min(stop, T) if skip else T) for start, stop in bounds]
