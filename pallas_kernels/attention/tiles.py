"""Tiles of the score matrix, for XLA: which there are, their masks and their scores."""

from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.how import How, Where, first_position, wide_type

# Finite, so that rows with every key masked give no NaN on the way to their zeros.
MASKED = -1e30
MIN_TILE, MAX_TILES = 128, 16


def einsum(maths: str, *operands: jax.Array) -> Any:
    """Summed, and returned, in fp32 or wider."""
    return jnp.einsum(maths, *operands, preferred_element_type=wide_type(*operands))


class Tile(NamedTuple):
    """Queries [start, stop) and the keys [begin, end) that they may see; none where begin ≥ end."""

    start: int
    stop: int
    begin: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.begin, self.end)

    def scores(
        self, q: jax.Array, k: jax.Array, where: Where, how: How
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scores, and their derivatives by scale·q·k; None: 1.

        Args:
            q: [B, S, K, G, H].
            k: [B, T, K, H].

        Returns:
            fp32 [B, K, G, stop − start, end − begin], MASKED where a query may not see a key.
        """
        scores = einsum("bskgh,btkh->bkgst", q[:, self.rows], k[:, self.keys]) * how.scale
        derivatives = None
        if how.soft_cap is not None:
            tanh = jnp.tanh(scores / how.soft_cap)
            scores, derivatives = how.soft_cap * tanh, 1 - tanh * tanh
        behind = self._behind(where, how)
        if where.slopes is not None:
            scores -= by_head(where.slopes, k.shape[2]) * jnp.abs(behind)[:, None, None]
        if where.biases is not None:
            biases = self._biases(where.biases, where, how)
            scores += biases.reshape(len(biases), *scores.shape[1:])
        mask = self._mask(behind, where, how)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, MASKED)
        return scores, derivatives

    def bias_gradient(self, d_scores: jax.Array, where: Where, how: How) -> jax.Array:
        """fp32 [N, 2R + 1]: of the biases, from the scores', fp32 [B, K, G, s, t]."""
        _, K, G, s, t = d_scores.shape
        if len(self._behind(where, how)) == 1:
            d_scores = d_scores.sum(axis=0, keepdims=True)
        pull = jax.linear_transpose(lambda x: self._biases(x, where, how), where.biases)
        return pull(d_scores.reshape(-1, K * G, s, t))[0]

    def _biases(self, biases: jax.Array, where: Where, how: How) -> jax.Array:
        """fp32 [B or 1, N, s, t]: of each query and key, from those by distance."""
        if where.q_positions is not None:
            return jnp.moveaxis(_at(biases, -self._behind(where, how)), 0, 1)
        # Without a gather per score: a row is the one above it, moved on by a place. One row of
        # s + t numbers is repeated s times, and all of it read again in rows of one fewer: each
        # begins with the last number that the one above left, and those of keys before the first
        # query stand at the repeated row's end.
        s, t = self.stop - self.start, self.end - self.begin
        q_at, k_at = self._positions(where, how)
        ahead = jnp.arange(s + t, dtype=jnp.int32)
        ahead = jnp.where(ahead < t, ahead, ahead - (s + t)) + (k_at[0, 0] - q_at[0, 0])
        row = _at(biases, ahead)
        rows = jnp.broadcast_to(row[:, None], (len(row), s, s + t)).reshape(len(row), -1)
        return rows[:, : s * (s + t - 1)].reshape(1, len(row), s, -1)[..., :t]

    def _behind(self, where: Where, how: How) -> jax.Array:
        """int32 [B or 1, s, t]: how far each key lies behind each query."""
        q_at, k_at = self._positions(where, how)
        return q_at[:, :, None] - k_at[:, None]

    def _positions(self, where: Where, how: How) -> tuple[jax.Array, jax.Array]:
        if where.q_positions is None or where.k_positions is None:
            q_at = jnp.arange(self.start, self.stop, dtype=jnp.int32)
            k_at = jnp.arange(self.begin, self.end, dtype=jnp.int32)
            q_at += first_position(how.q_offset, where.q_offset)
            k_at += first_position(how.k_offset, where.k_offset)
            return q_at[None], k_at[None]
        return where.q_positions[:, self.rows], where.k_positions[:, self.keys]

    def _mask(self, behind: jax.Array, where: Where, how: How) -> jax.Array | None:
        """bool [B or 1, s, t]: which keys each query may see; None: all."""
        parts = []
        if how.causal:
            seen = behind >= 0
            if how.window is not None:
                seen &= behind < how.window
            if where.prefix is not None:
                k_at = self._positions(where, how)[1]
                seen |= (k_at < where.prefix[:, None])[:, None]
            parts.append(seen)
        if where.q_segments is not None and where.k_segments is not None:
            own, other = where.q_segments[:, self.rows, None], where.k_segments[:, None, self.keys]
            parts += [own == other, own != 0]
        return reduce(and_, parts) if parts else None


def tiles(S: int, T: int, where: Where, how: How) -> list[Tile]:
    """At most MAX_TILES runs of queries: the program grows with their number."""
    size = tile_size(S)
    bounds = [(start, min(start + size, S)) for start in range(0, S, size)]
    if not empties_known(where, how):
        return [Tile(start, stop, 0, T) for start, stop in bounds]
    own = how.q_offset - how.k_offset  # the key at the first query's position
    window = S + T + abs(own) if how.window is None else how.window
    return [
        Tile(start, stop, max(own + start - window + 1, 0), min(own + stop, T))
        for start, stop in bounds
    ]


def empties_known(where: Where, how: How) -> bool:
    """Whether a causal mask says now, not when the program runs, which keys no query sees."""
    left_open = where.q_positions, where.q_offset, where.k_offset, where.prefix
    return how.causal and all(x is None for x in left_open)


def tile_size(S: int) -> int:
    return max(MIN_TILE, -(-S // MAX_TILES))


def placed(where: Where, how: How, S: int, T: int) -> Where:
    """Positions of both sides as arrays, where one side's are."""
    if where.q_positions is None and where.k_positions is None:
        return where

    def of(positions, static, traced, length):
        if positions is not None:
            return positions
        return (jnp.arange(length, dtype=jnp.int32) + first_position(static, traced))[None]

    return where._replace(
        q_positions=of(where.q_positions, how.q_offset, where.q_offset, S),
        k_positions=of(where.k_positions, how.k_offset, where.k_offset, T),
        q_offset=None,
        k_offset=None,
    )


def _at(biases: jax.Array, ahead: jax.Array) -> jax.Array:
    """[N, 2R + 1] at distances of any shape: [N, ...]."""
    reach = biases.shape[1] // 2
    index = jnp.clip(ahead, -reach, reach) + reach
    return biases.at[:, index].get(mode="promise_in_bounds")


def by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """[N] → [K, G, 1, 1], to stand beside scores."""
    return x.reshape(kv_heads, -1, 1, 1)
