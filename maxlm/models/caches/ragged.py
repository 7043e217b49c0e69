"""Tokens of a step, several sequences side by side, and how caches take them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxlm.parallel.paged_attention import PagedRows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "positions",
        "lengths",
        "kv_lengths",
        "query_starts",
        "chunk_rows",
        "page_tables",
        "slots",
    ),
    meta_fields=("windows", "uniform_rows"),
)
@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of a step, sequence by sequence: of b sequences with G tokens each, then of F chunks
    of other ones. Leading axes are D."""

    positions: jax.Array
    """int32 [D, S]."""
    lengths: jax.Array
    """int32 [D, S]: tokens of each token's sequence that are known, later ones of a prompt too."""
    kv_lengths: jax.Array
    """int32 [D, b + F]: tokens of each sequence with these; 0: there is none."""
    query_starts: jax.Array
    """int32 [D, b + F + 1]: each sequence's first token in S; behind the last are none."""
    chunk_rows: jax.Array
    """int32 [D, F]: the row of each chunk's sequence; the first b sequences are rows 0 to b − 1."""
    page_tables: tuple[jax.Array, ...]
    """int32 [D, b + F, M], for each of ``windows``."""
    slots: tuple[jax.Array, ...]
    """int32 [D, S], for each of ``windows``; see :class:`PagedRows`."""
    windows: tuple[int | None, ...]
    """Windows of the model's layers, each with pages of its own."""
    uniform_rows: tuple[int, int]
    """(b, G)."""

    def pages(self, window: int | None) -> PagedRows:
        """Returns where layers of a window keep these tokens."""
        group = self.windows.index(window)
        tables = self.slots[group], self.page_tables[group]
        return PagedRows(*tables, self.kv_lengths, self.query_starts)

    def split_rows(self, x: jax.Array) -> jax.Array:
        """Reshapes tokens of uniform rows, [D, b·G, ...] → [D, b, G, ...]."""
        first, _, *rest = jax.typeof(x).sharding.spec
        spec = PartitionSpec(first, None, None, *rest)
        return x.reshape(len(x), *self.uniform_rows, *x.shape[2:], out_sharding=spec)

    def split_chunks(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gathers the tokens of chunks from x [D, S, ...] to [D, F, C, ...], each chunk as long as
        all of them, C; returns them, and where each of the C tokens is in F·C, [D, C]."""
        first, begins = self.uniform_rows[0], math.prod(self.uniform_rows)
        starts = self.query_starts[:, first:]
        (D, F), C = self.chunk_rows.shape, x.shape[1] - begins
        place = jnp.arange(C, dtype=jnp.int32)
        at = jnp.minimum(starts[:, :-1, None] + place, x.shape[1] - 1)
        batch, _, *rest = jax.typeof(x).sharding.spec
        flat = at.reshape(D, F * C, *(1,) * (x.ndim - 2))
        spec = PartitionSpec(batch, None, None, *rest)
        tokens = jnp.take_along_axis(x, flat, axis=1)
        tokens = tokens.reshape(D, F, C, *x.shape[2:], out_sharding=spec)
        chunk = jnp.sum(place[:, None] + begins >= starts[:, None, 1:], axis=-1)
        chunk = jnp.minimum(chunk, F - 1)
        own = place + begins - jnp.take_along_axis(starts, chunk, axis=1)
        return tokens, jnp.clip(chunk * C + own, 0, F * C - 1)


def fold_rows(x: jax.Array) -> jax.Array:
    """Reshapes [D, b, ...] → [D·b, ...], split as D was."""
    spec = jax.typeof(x).sharding.spec
    return x.reshape(-1, *x.shape[2:], out_sharding=PartitionSpec(spec[0], *spec[2:]))


class RowTokens(NamedTuple):
    """Tokens of n rows of one shard, T each."""

    positions: jax.Array
    """int32 [n, T]."""
    live: jax.Array
    """bool [n, T]; those of a row come first."""

    @property
    def begins(self) -> jax.Array:
        """bool [n]: whether the row's sequence begins here, whatever the cache has."""
        return self.live[:, 0] & (self.positions[:, 0] == 0)


def run_rows(
    advance: Callable[[Any, Any, RowTokens], tuple[Any, jax.Array]],
    states: Any,
    tokens: Any,
    batch: RaggedBatch,
) -> tuple[Any, jax.Array]:
    """Runs tokens of one shard through caches that are kept by row: uniform rows together, then
    chunks, each as long as all of them.

    Args:
        advance: ``(states [n, ...], tokens [n, T, ...], where) -> (states, y [n, T, ...])`` for
            rows side by side, where tokens that are not live leave a state as it was.
        states, tokens: trees of arrays [R, ...] and [S, ...].
        batch: of one shard, without D.

    Returns:
        The states, and y [S, ...].
    """
    (rows, width), outputs = batch.uniform_rows, []
    num_rows, num_tokens = (len(jax.tree.leaves(x)[0]) for x in (states, tokens))
    room = num_tokens - rows * width
    if room:  # first: what comes last may read whole states, as nothing is written after it
        starts, ids = batch.query_starts[rows:], batch.chunk_rows
        at = starts[:-1, None] + jnp.arange(room)
        live = at < starts[1:, None]
        index = jnp.minimum(at, num_tokens - 1)
        where = RowTokens(batch.positions[index], live)
        own = jax.tree.map(lambda x: x[index], tokens)
        after, y = advance(jax.tree.map(lambda s: s[ids], states), own, where)
        # Rows without a live token keep what they have, and may be named twice.
        used = jnp.where(live.any(axis=1), ids, num_rows)
        states = jax.tree.map(lambda s, a: s.at[used].set(a, mode="drop"), states, after)
        out = jnp.zeros((room, *y.shape[2:]), y.dtype)
        place = jnp.where(live, index - rows * width, room)
        outputs.append(out.at[place].set(y, mode="drop"))
    if rows:
        own = jax.tree.map(lambda x: x[: rows * width].reshape(rows, width, *x.shape[1:]), tokens)
        positions = batch.positions[: rows * width].reshape(rows, width)
        where = RowTokens(positions, positions < batch.kv_lengths[:rows, None])
        after, y = advance(jax.tree.map(lambda s: s[:rows], states), own, where)
        if rows < num_rows:
            after = jax.tree.map(lambda s, a: s.at[:rows].set(a), states, after)
        states = after
        outputs.append(y.reshape(rows * width, *y.shape[2:]))
    return states, outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs[::-1])
