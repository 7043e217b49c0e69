"""Tokens of a step, several sequences side by side, and how caches by row take them.

Shapes: D shards of the batch, S tokens of a step, b uniform rows of G tokens, F chunks,
R rows; n rows side by side, T tokens of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from maxlm.parallel.decode_kernels import PagedKernel
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import SplitArray, map_shards
from maxlm.sharding import AxisRules

StatesT = TypeVar("StatesT")
"""What a cache by row keeps: a tree of arrays [R, ...]."""
TokensT = TypeVar("TokensT")
"""What a cache takes of new tokens: an array [S, ...], or a tree of some."""


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
    advance: Callable[[StatesT, TokensT, RowTokens], tuple[StatesT | None, jax.Array]],
    states: StatesT,
    tokens: TokensT,
    batch: RaggedBatch,
) -> tuple[StatesT, jax.Array]:
    """Runs tokens of one shard through caches that are kept by row: uniform rows
    together, then chunks, each as long as all of them.

    Args:
        advance: ``(states [n, ...], tokens [n, T, ...], rows) -> (states, y [n, T,
            ...])`` for rows side by side, where tokens that are not live leave a state
            as it was; no states: all stay as they are.
        states, tokens: trees of arrays [R, ...] and [S, ...].
        batch: of one shard, without D.

    Returns:
        The states, and y [S, ...].
    """
    num_uniform, tokens_per_row = batch.uniform_rows
    num_uniform_tokens = num_uniform * tokens_per_row
    num_rows = len(jax.tree.leaves(states)[0])
    num_tokens = len(jax.tree.leaves(tokens)[0])
    num_chunk_tokens = num_tokens - num_uniform_tokens
    outputs = []

    # Chunks first: what comes last may read whole states, as nothing is written after
    # it.
    if num_chunk_tokens:
        # Shapes are fixed while chunks' lengths are not: each of F chunks has room for
        # as many tokens as all chunks have together, [F, chunk tokens].
        starts = batch.query_starts[num_uniform:]
        chunk_rows = batch.chunk_rows
        place = starts[:-1, None] + jnp.arange(num_chunk_tokens)
        live = place < starts[1:, None]
        index = jnp.minimum(place, num_tokens - 1)
        row_tokens = RowTokens(batch.positions[index], live)
        chunk_tokens = jax.tree.map(lambda x: x[index], tokens)
        old_states = jax.tree.map(lambda s: s[chunk_rows], states)
        new_states, y = advance(old_states, chunk_tokens, row_tokens)
        if new_states is not None:
            # Rows without a live token keep what they have, and may be named twice.
            written_rows = jnp.where(live.any(axis=1), chunk_rows, num_rows)
            states = jax.tree.map(
                lambda s, new: s.at[written_rows].set(new, mode="drop"),
                states,
                new_states,
            )
        # [F, chunk tokens, ...] → [chunk tokens, ...]; places past the end are dropped.
        output = jnp.zeros((num_chunk_tokens, *y.shape[2:]), y.dtype)
        out_index = jnp.where(live, index - num_uniform_tokens, num_chunk_tokens)
        outputs.append(output.at[out_index].set(y, mode="drop"))

    if num_uniform:

        def split_rows(x: jax.Array) -> jax.Array:
            """Uniform rows' tokens of x [S, ...] → [b, G, ...]."""
            uniform_tokens = x[:num_uniform_tokens]
            return uniform_tokens.reshape(num_uniform, tokens_per_row, *x.shape[1:])

        uniform_tokens = jax.tree.map(split_rows, tokens)
        positions = split_rows(batch.positions)
        live = positions < batch.kv_lengths[:num_uniform, None]
        row_tokens = RowTokens(positions, live)
        # Uniform rows are the first of a shard.
        old_states = jax.tree.map(lambda s: s[:num_uniform], states)
        new_states, y = advance(old_states, uniform_tokens, row_tokens)
        if new_states is not None and num_uniform < num_rows:
            new_states = jax.tree.map(
                lambda s, new: s.at[:num_uniform].set(new), states, new_states
            )
        states = states if new_states is None else new_states
        outputs.append(y.reshape(num_uniform_tokens, *y.shape[2:]))

    if len(outputs) == 1:
        return states, outputs[0]
    chunk_output, uniform_output = outputs
    return states, jnp.concatenate([uniform_output, chunk_output])


class RecurrentCache(NamedTuple):
    """States passed from token to token, arrays [D, R, ...] for every row; zeros before
    the first."""

    state: PyTree

    def run(
        self,
        advance: Callable[..., tuple[PyTree, jax.Array]],
        tokens: Sequence[SplitArray],
        batch: RaggedBatch,
        rules: AxisRules,
        *,
        params: Sequence[SplitArray] = (),
        output_axes: tuple[str | None, ...],
    ) -> tuple[jax.Array, "RecurrentCache"]:
        """Runs tokens through the recurrence; returns its outputs [D, S, ...], and the
        cache after them.

        Args:
            advance: ``(states [n, ...], tokens [n, T, ...], live bool [n, T], *params)
                -> (states, y [n, T, ...])`` for rows side by side, on each device with
                its own share of the axes that are split; ``tokens`` is a tuple of
                arrays. Tokens that are not ``live`` leave a state as it was.
            tokens: arrays [D, S, ...].
            params: arrays that all tokens read.
            output_axes: logical axes of y's dimensions behind [D, S].
        """

        def advance_shard(
            states: PyTree,
            tokens: tuple[jax.Array, ...],
            batch: RaggedBatch,
            params: tuple[jax.Array, ...],
        ) -> tuple[PyTree, jax.Array]:
            # A shard's part of D is 1.
            states, tokens, batch = jax.tree.map(
                lambda a: a[0], (states, tokens, batch)
            )

            def advance_rows(
                states: PyTree, tokens: tuple[jax.Array, ...], rows: RowTokens
            ) -> tuple[PyTree, jax.Array]:
                def reset(state: jax.Array) -> jax.Array:
                    """Zeros the state [n, ...] of sequences that begin."""
                    features = (1,) * (state.ndim - 1)
                    begins = rows.begins.reshape(-1, *features)
                    return jnp.where(begins, 0, state)

                fresh_states = jax.tree.map(reset, states)
                return advance(fresh_states, tokens, rows.live, *params)

            states_and_y = run_rows(advance_rows, states, tokens, batch)
            return jax.tree.map(lambda a: a[None], states_and_y)

        token_specs = tuple(rules.spec("batch", None, *array.axes) for array in tokens)
        param_specs = tuple(rules.spec(*array.axes) for array in params)
        output_spec = rules.spec("batch", None, *output_axes)
        state_specs = jax.tree.map(lambda s: jax.typeof(s).sharding.spec, self.state)
        in_specs = state_specs, token_specs, rules.spec("batch"), param_specs
        run_shards = map_shards(advance_shard, in_specs, (state_specs, output_spec))
        states, y = run_shards(
            self.state,
            tuple(array.value for array in tokens),
            batch,
            tuple(array.value for array in params),
        )
        return y, RecurrentCache(states)
