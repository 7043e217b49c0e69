"""Tiles of the score matrix, for XLA: which there are, their masks and their scores."""

from typing import NamedTuple

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
# Queries of a tile at least, and tiles at most: the program grows with their number.
MIN_TILE = 128
MAX_TILES = 16


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
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
        operands = self.operands
        params = self.params
        q = operands.q[:, self.rows]  # [B, s, K, G, H]
        k = operands.k[:, self.keys]  # [B, t, K, H]
        scores = einsum("bskgh,btkh->bkgst", q, k) * params.scale
        derivatives = None
        if params.soft_cap is not None:
            # cap · tanh(score / cap), whose derivative by the score is 1 − tanh².
            tanh = jnp.tanh(scores / params.soft_cap)
            scores = params.soft_cap * tanh
            derivatives = 1 - tanh * tanh
        behind = self._behind()  # [B or 1, s, t]
        if operands.slopes is not None:
            slopes = reshape_by_head(operands.slopes, k.shape[2])
            distance = jnp.abs(behind)[:, None, None]
            scores -= slopes * distance
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
            # All rows of the batch have the same biases.
            d_scores = d_scores.sum(axis=0, keepdims=True)
        # What spreads biases over scores is linear: its transpose sums gradients up.
        pull = jax.linear_transpose(self._biases, self.operands.biases)
        d_scores = d_scores.reshape(-1, K * G, s, t)
        (d_biases,) = pull(d_scores)
        return d_biases

    def _biases(self, biases: jax.Array) -> jax.Array:
        """fp32 [B or 1, N, s, t]: of each query and key, from those by distance."""
        if self.operands.q_positions is not None:
            by_pair = _look_up_distances(biases, -self._behind())
            return jnp.moveaxis(by_pair, 0, 1)
        # Without a gather per score: a row is the one above it, moved on by a place.
        # One row of s + t numbers is repeated s times, and all of it read again in rows
        # of one fewer: each begins with the last number that the one above left, and
        # those of keys before the first query stand at the repeated row's end.
        s = self.rows.stop - self.rows.start
        t = self.keys.stop - self.keys.start
        q_positions, k_positions = self._positions()
        # How far each number's key lies ahead of the first query.
        ahead = jnp.arange(s + t, dtype=jnp.int32)
        ahead = jnp.where(ahead < t, ahead, ahead - (s + t))
        ahead = ahead + (k_positions[0, 0] - q_positions[0, 0])
        first_row = _look_up_distances(biases, ahead)  # [N, s + t]
        N = len(first_row)
        repeated = jnp.broadcast_to(first_row[:, None], (N, s, s + t))
        repeated = repeated.reshape(N, -1)
        rows = repeated[:, : s * (s + t - 1)].reshape(1, N, s, -1)
        return rows[..., :t]

    def _behind(self) -> jax.Array:
        """int32 [B or 1, s, t]: how far each key lies behind each query."""
        q_positions, k_positions = self._positions()
        return q_positions[:, :, None] - k_positions[:, None]

    def _positions(self) -> tuple[jax.Array, jax.Array]:
        """int32 [B or 1, s] and [B or 1, t]."""
        operands = self.operands
        params = self.params
        rows = self.rows
        keys = self.keys
        if operands.q_positions is None or operands.k_positions is None:
            q_positions = jnp.arange(rows.start, rows.stop, dtype=jnp.int32)
            k_positions = jnp.arange(keys.start, keys.stop, dtype=jnp.int32)
            q_positions += sum_offsets(params.q_offset, operands.q_offset)
            k_positions += sum_offsets(params.k_offset, operands.k_offset)
            return q_positions[None], k_positions[None]
        return operands.q_positions[:, rows], operands.k_positions[:, keys]

    def _mask(self, behind: jax.Array) -> jax.Array | None:
        """bool [B or 1, s, t]: which keys each query may see; None: all."""
        in_prefix = None
        segments = None
        operands = self.operands
        if operands.prefix is not None:
            _, k_positions = self._positions()
            in_prefix = (k_positions < operands.prefix[:, None])[:, None]
        if operands.q_segments is not None and operands.k_segments is not None:
            q_segments = operands.q_segments[:, self.rows, None]
            k_segments = operands.k_segments[:, None, self.keys]
            segments = q_segments, k_segments
        return combine_masks(self.params, behind, in_prefix, segments)


def list_score_tiles(
    operands: AttentionOperands, params: AttentionParams
) -> list[ScoreTile]:
    """Lists at most MAX_TILES runs of queries, of operands with q [B, S, K, G, H]: the
    program grows with their number."""
    S = operands.q.shape[1]
    T = operands.k.shape[1]
    size = tile_size(S)
    runs = [slice(start, min(start + size, S)) for start in range(0, S, size)]
    if not is_mask_static(operands, params):
        return [ScoreTile(rows, slice(0, T), operands, params) for rows in runs]
    # The key at the first query's position, which may be none.
    diagonal = params.q_offset - params.k_offset
    tiles = []
    for rows in runs:
        # From the first query's window to the last query's own position.
        first_key = 0
        if params.window is not None:
            first_key = max(diagonal + rows.start - params.window + 1, 0)
        end_key = min(diagonal + rows.stop, T)
        keys = slice(first_key, end_key)
        tiles.append(ScoreTile(rows, keys, operands, params))
    return tiles


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
    """Returns queries of a tile."""
    size_of_most_tiles = -(-S // MAX_TILES)
    return max(MIN_TILE, size_of_most_tiles)


def _look_up_distances(biases: jax.Array, ahead: jax.Array) -> jax.Array:
    """Biases [N, 2R + 1] at distances of any shape: [N, ...]."""
    reach = biases.shape[1] // 2
    index = jnp.clip(ahead, -reach, reach) + reach
    return biases.at[:, index].get(mode="promise_in_bounds")


def reshape_by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes [N] → [K, G, 1, 1], to stand beside scores."""
    return x.reshape(kv_heads, -1, 1, 1)
