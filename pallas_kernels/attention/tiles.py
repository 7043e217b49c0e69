"""Tiles of the score matrix, for XLA: which there are, their masks and their scores."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.params import (
    AttentionOperands,
    AttentionParams,
    accumulation_dtype,
    combine_masks,
    sum_offsets,
)

# Finite, so that rows with every key masked give no NaN on the way to their zeros.
MASKED = -1e30
MIN_TILE, MAX_TILES = 128, 16


def einsum(subscripts: str, *operands: jax.Array) -> Any:
    """Contracts as ``jnp.einsum``; sums and results are fp32 or wider."""
    return jnp.einsum(
        subscripts, *operands, preferred_element_type=accumulation_dtype(*operands)
    )


class ScoreTile(NamedTuple):
    """Queries, and the keys that they may see; none where these start at their stop or
    later."""

    rows: slice
    keys: slice
    operands: AttentionOperands
    """Those of all queries, q as [B, S, K, G, H]."""
    params: AttentionParams

    def scores(self) -> tuple[jax.Array, jax.Array | None]:
        """Computes scores, fp32 [B, K, G, rows, keys], MASKED where a query may not see
        a key; and their derivatives by scale·q·k; None: 1."""
        operands, params = self.operands, self.params
        q, k = operands.q[:, self.rows], operands.k[:, self.keys]
        scores = einsum("bskgh,btkh->bkgst", q, k) * params.scale
        derivatives = None
        if params.soft_cap is not None:
            tanh = jnp.tanh(scores / params.soft_cap)
            scores, derivatives = params.soft_cap * tanh, 1 - tanh * tanh
        behind = self._behind()
        if operands.slopes is not None:
            scores -= (
                reshape_by_head(operands.slopes, k.shape[2])
                * jnp.abs(behind)[:, None, None]
            )
        if operands.biases is not None:
            biases = self._biases(operands.biases)
            scores += biases.reshape(len(biases), *scores.shape[1:])
        mask = self._mask(behind)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, MASKED)
        return scores, derivatives

    def bias_gradient(self, d_scores: jax.Array) -> jax.Array:
        """Returns the biases' gradient, fp32 [N, 2R + 1], from scores', fp32 [B, K, G,
        s, t]."""
        _, K, G, s, t = d_scores.shape
        if len(self._behind()) == 1:
            d_scores = d_scores.sum(axis=0, keepdims=True)
        pull = jax.linear_transpose(self._biases, self.operands.biases)
        return pull(d_scores.reshape(-1, K * G, s, t))[0]

    def _biases(self, biases: jax.Array) -> jax.Array:
        """fp32 [B or 1, N, s, t]: of each query and key, from those by distance."""
        if self.operands.q_positions is not None:
            return jnp.moveaxis(_at(biases, -self._behind()), 0, 1)
        # Without a gather per score: a row is the one above it, moved on by a place.
        # One row of s + t numbers is repeated s times, and all of it read again in rows
        # of one fewer: each begins with the last number that the one above left, and
        # those of keys before the first query stand at the repeated row's end.
        s, t = (x.stop - x.start for x in (self.rows, self.keys))
        q_at, k_at = self._positions()
        ahead = jnp.arange(s + t, dtype=jnp.int32)
        ahead = jnp.where(ahead < t, ahead, ahead - (s + t)) + (k_at[0, 0] - q_at[0, 0])
        row = _at(biases, ahead)
        rows = jnp.broadcast_to(row[:, None], (len(row), s, s + t)).reshape(
            len(row), -1
        )
        return rows[:, : s * (s + t - 1)].reshape(1, len(row), s, -1)[..., :t]

    def _behind(self) -> jax.Array:
        """int32 [B or 1, s, t]: how far each key lies behind each query."""
        q_at, k_at = self._positions()
        return q_at[:, :, None] - k_at[:, None]

    def _positions(self) -> tuple[jax.Array, jax.Array]:
        operands, params = self.operands, self.params
        if operands.q_positions is None or operands.k_positions is None:
            sides = self.rows, self.keys
            q_at, k_at = (jnp.arange(x.start, x.stop, dtype=jnp.int32) for x in sides)
            q_at += sum_offsets(params.q_offset, operands.q_offset)
            k_at += sum_offsets(params.k_offset, operands.k_offset)
            return q_at[None], k_at[None]
        return operands.q_positions[:, self.rows], operands.k_positions[:, self.keys]

    def _mask(self, behind: jax.Array) -> jax.Array | None:
        """bool [B or 1, s, t]: which keys each query may see; None: all."""
        in_prefix = None
        segments = None
        operands = self.operands
        if operands.prefix is not None:
            k_at = self._positions()[1]
            in_prefix = (k_at < operands.prefix[:, None])[:, None]
        if operands.q_segments is not None and operands.k_segments is not None:
            own = operands.q_segments[:, self.rows, None]
            segments = own, operands.k_segments[:, None, self.keys]
        return combine_masks(self.params, behind, in_prefix, segments)


def list_score_tiles(
    operands: AttentionOperands, params: AttentionParams
) -> list[ScoreTile]:
    """Lists at most MAX_TILES runs of queries, of operands with q [B, S, K, G, H]: the
    program grows with their number."""
    S, T = operands.q.shape[1], operands.k.shape[1]
    size = tile_size(S)
    runs = [slice(start, min(start + size, S)) for start in range(0, S, size)]
    if not is_mask_static(operands, params):
        return [ScoreTile(rows, slice(0, T), operands, params) for rows in runs]
    own = params.q_offset - params.k_offset  # the key at the first query's position
    window = S + T + abs(own) if params.window is None else params.window

    def tile(rows: slice) -> ScoreTile:
        keys = slice(max(own + rows.start - window + 1, 0), min(own + rows.stop, T))
        return ScoreTile(rows, keys, operands, params)

    return [tile(rows) for rows in runs]


def is_mask_static(operands: AttentionOperands, params: AttentionParams) -> bool:
    """Returns whether a causal mask says now, not when the program runs, which keys no
    query sees."""
    left_open = (
        operands.q_positions,
        operands.q_offset,
        operands.k_offset,
        operands.prefix,
    )
    return params.causal and all(x is None for x in left_open)


def tile_size(S: int) -> int:
    return max(MIN_TILE, -(-S // MAX_TILES))


def _at(biases: jax.Array, ahead: jax.Array) -> jax.Array:
    """[N, 2R + 1] at distances of any shape: [N, ...]."""
    reach = biases.shape[1] // 2
    index = jnp.clip(ahead, -reach, reach) + reach
    return biases.at[:, index].get(mode="promise_in_bounds")


def reshape_by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes [N] → [K, G, 1, 1], to stand beside scores."""
    return x.reshape(kv_heads, -1, 1, 1)
