"""Tokens of a step, several sequences side by side, and how caches by row take them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.parallel.decode_kernels import PagedKernel
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of a step, sequence by sequence: of b sequences with G tokens each, then
    of F chunks of other ones. Leading axes are D."""

    positions: jax.Array
    """int32 [D, S]."""
    lengths: jax.Array
    """int32 [D, S]: tokens of each token's sequence that are known, later ones of a
    prompt too."""
    kv_lengths: jax.Array
    """int32 [D, b + F]: tokens of each sequence with these; 0: there is none."""
    query_starts: jax.Array
    """int32 [D, b + F + 1]: each sequence's first token in S; behind the last are
    none."""
    chunk_rows: jax.Array
    """int32 [D, F]: the row of each chunk's sequence; the first b sequences are rows 0
    to b − 1."""
    page_tables: tuple[jax.Array, ...]
    """int32 [D, b + F, M], for each of ``windows``."""
    slots: tuple[jax.Array, ...]
    """int32 [D, S], for each of ``windows``: where each token is written, page ·
    page_size + offset; past the last page: it is not."""
    windows: tuple[int | None, ...] = field(metadata={"static": True})
    """Windows of the model's layers, each with pages of its own."""
    uniform_rows: tuple[int, int] = field(metadata={"static": True})
    """(b, G)."""
    attention_kernel: PagedKernel | None = field(
        default=None, metadata={"static": True}
    )
    """The engine's own kernel for attention to pages, used where it supports a call;
    None: those of ``pallas_kernels`` alone."""

    def pages(self, window: int | None) -> tuple[jax.Array, jax.Array]:
        """Returns the slots and page tables of layers of a window."""
        group = self.windows.index(window)
        return self.slots[group], self.page_tables[group]


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
    """Runs tokens of one shard through caches that are kept by row: uniform rows
    together, then chunks, each as long as all of them.

    Args:
        advance: ``(states [n, ...], tokens [n, T, ...], where) -> (states, y [n, T,
            ...])`` for rows side by side, where tokens that are not live leave a state
            as it was; no states: all stay as they are.
        states, tokens: trees of arrays [R, ...] and [S, ...].
        batch: of one shard, without D.

    Returns:
        The states, and y [S, ...].
    """
    rows, width = batch.uniform_rows
    outputs = []
    num_rows, num_tokens = (len(jax.tree.leaves(x)[0]) for x in (states, tokens))
    room = num_tokens - rows * width
    if (
        room
    ):  # first: what comes last may read whole states, as nothing is written after it
        starts = batch.query_starts[rows:]
        ids = batch.chunk_rows
        at = starts[:-1, None] + jnp.arange(room)
        live = at < starts[1:, None]
        index = jnp.minimum(at, num_tokens - 1)
        where = RowTokens(batch.positions[index], live)
        own = jax.tree.map(lambda x: x[index], tokens)
        after, y = advance(jax.tree.map(lambda s: s[ids], states), own, where)
        if after is not None:
            # Rows without a live token keep what they have, and may be named twice.
            used = jnp.where(live.any(axis=1), ids, num_rows)
            states = jax.tree.map(
                lambda s, a: s.at[used].set(a, mode="drop"), states, after
            )
        out = jnp.zeros((room, *y.shape[2:]), y.dtype)
        outputs.append(
            out.at[jnp.where(live, index - rows * width, room)].set(y, mode="drop")
        )
    if rows:
        own = jax.tree.map(
            lambda x: x[: rows * width].reshape(rows, width, *x.shape[1:]), tokens
        )
        positions = batch.positions[: rows * width].reshape(rows, width)
        where = RowTokens(positions, positions < batch.kv_lengths[:rows, None])
        after, y = advance(jax.tree.map(lambda s: s[:rows], states), own, where)
        if after is not None and rows < num_rows:
            after = jax.tree.map(lambda s, a: s.at[:rows].set(a), states, after)
        states = states if after is None else after
        outputs.append(y.reshape(rows * width, *y.shape[2:]))
    return states, outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs[::-1])


class RecurrentCache(NamedTuple):
    """A state passed from token to token, for every row [D, R, ...]; zeros before the
    first."""

    state: Any

    def run(
        self,
        advance: Callable[..., tuple[Any, jax.Array]],
        x: jax.Array,
        batch: RaggedBatch,
        rules: AxisRules,
        feature_axis: str,
        *params: jax.Array,
    ) -> tuple[jax.Array, "RecurrentCache"]:
        """Runs tokens through the recurrence; returns its outputs, and the cache after
        them.

        Args:
            advance: ``(states [n, ...], x [n, T, F], live bool [n, T], *params) ->
                (states, y [n, T, F])`` for rows side by side, on each device with its
                own features; tokens that are not ``live`` leave a state as it was.
            x: [D, S, F].
            feature_axis: the logical axis of F, of the states' last dimension and the
                params'.
        """

        def local(states, x, batch, params):
            states, x, batch = jax.tree.map(lambda a: a[0], (states, x, batch))

            def advance_fresh(states, x, where):
                begins = where.begins
                fresh = jax.tree.map(
                    lambda s: jnp.where(begins.reshape(-1, *(1,) * (s.ndim - 1)), 0, s),
                    states,
                )
                return advance(fresh, x, where.live, *params)

            return jax.tree.map(
                lambda a: a[None], run_rows(advance_fresh, states, x, batch)
            )

        features = rules.spec("batch", None, feature_axis)
        states = jax.tree.map(lambda s: jax.typeof(s).sharding.spec, self.state)
        own = tuple(rules.spec(*(None,) * (a.ndim - 1), feature_axis) for a in params)
        specs = states, features, rules.spec("batch"), own
        states, y = map_shards(local, specs, (states, features))(
            self.state, x, batch, params
        )
        return y, RecurrentCache(states)
