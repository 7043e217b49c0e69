"""A fixed number of tokens of each sequence, whatever its length: StreamingLLM (Xiao et
al. 2024, arXiv 2309.17453), H2O (Zhang et al. 2023, arXiv 2306.14048), SnapKV (Li et
al. 2024, arXiv 2404.14469).

Each kv head chooses for itself. A new token takes the place of the one that matters
least, then attends to all that is kept; a chunk of a prompt is attended to in full,
then the best of it and of what was kept stay. Keys keep the rotary positions of their
tokens, also in StreamingLLM, which counts places in the cache instead. The current
token and the recent ones are never evicted, and what is behind a layer's window always
is first. A sequence within the budget is exact.

Shapes: D shards of the batch, R rows of a shard, n of them side by side, T tokens of
each; M tokens kept; N query heads, K kv heads, G = N / K; H head dim, Hv value dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Self, cast

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.models.caches.config import (
    EvictingCacheConfig,
    HeavyHittersCacheConfig,
    SinksCacheConfig,
    SnapKVCacheConfig,
)
from maxlm.models.caches.paged import AttentionCache
from maxlm.models.caches.ragged import RaggedBatch, RowTokens, run_rows
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import AxisRules


class _NewTokens(NamedTuple):
    """Queries, keys and values of new tokens, [n, T, heads, features] each."""

    q: jax.Array
    key: jax.Array
    value: jax.Array | None
    """None: a token's value is the beginning of its key."""


_AttendRows = Callable[
    [jax.Array, jax.Array, jax.Array | None, jax.Array, RowTokens],
    tuple[jax.Array, jax.Array],
]
"""(q, key, value, positions, rows) of :func:`_attend_rows` -> (y, weights)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvictingCache(AttentionCache):
    """M tokens of each row and kv head, in any order."""

    key: jax.Array
    """[D, R, K, M, H]."""
    value: jax.Array | None
    """[D, R, K, M, Hv]; None: a token's value is the beginning of its key."""
    positions: jax.Array
    """int32 [D, R, K, M]: 1 and the token's position; 0: none."""
    scores: jax.Array | None
    """fp32 [D, R, K, M]: weights that the token was given; None: they do not matter."""
    config: EvictingCacheConfig = field(metadata={"static": True})
    knows_chunks = True

    def attend_shard(
        self,
        q: jax.Array,
        key: jax.Array | None,
        value: jax.Array | None,
        batch: RaggedBatch,
        terms: AttentionTerms,
        *,
        rules: AxisRules,
        value_dim: int | None,
    ) -> tuple[jax.Array, Self]:
        """See :class:`AttentionCache`. Where devices have heads that share keys, they
        add up the weights that these were given. Rows have no drafts
        (``check_speculation``): no token could be taken back.
        """
        assert key is not None
        head_axes = rules.mesh_axes("heads")
        kv_axes = rules.mesh_axes("kv_heads")
        attend = partial(
            _attend_rows,
            terms=terms,
            value_dim=value_dim,
            shared_axes=tuple(set(head_axes) - set(kv_axes)),
        )
        keep_best = partial(_keep_best, terms=terms, attend=attend)

        def advance(
            cache: EvictingCache, tokens: _NewTokens, rows: RowTokens
        ) -> tuple[EvictingCache, jax.Array]:
            # A sequence that begins finds no tokens of the one that had its row.
            begins = rows.begins[:, None, None]
            positions = jnp.where(begins, 0, cache.positions)
            cache = replace(cache, positions=positions)
            tokens_per_row = tokens.q.shape[1]
            if tokens_per_row == 1:
                return _replace_one(cache, tokens, rows, terms, attend)
            # Row after row: one without tokens is skipped, and scores of queries with
            # all keys are in memory for one row at a time.
            return lax.map(
                lambda row: _skip_if_empty(keep_best, *row), (cache, tokens, rows)
            )

        cache, y = run_rows(advance, self, _NewTokens(q, key, value), batch)
        return y, cast(Self, cache)


def _attend_rows(
    q: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    positions: jax.Array,
    rows: RowTokens,
    *,
    terms: AttentionTerms,
    value_dim: int | None,
    shared_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Attends with q [n, T, N, H] to key [n, K, S, H]; positions int32 [n, K, S] are 1
    and the token's, 0 for none. Returns y [n, T, N, Hv] and fp32 [n, K, T, S]: the
    weights, summed over the heads that share keys."""
    n, T, N, H = q.shape
    K = key.shape[1]
    G = N // K
    assert terms.scale is not None
    wide = jnp.promote_types(q.dtype, jnp.float32)

    # Scores [n, K, G, T, S].
    q = q.reshape(n, T, K, G, H)
    scores = jnp.einsum("ntkgh,nksh->nkgts", q, key, preferred_element_type=wide)
    scores *= terms.scale
    # [n, K, T, S]: each kv head keeps tokens of its own.
    query_positions = rows.positions[:, None, :, None]
    distance = query_positions - (positions[:, :, None] - 1)
    if terms.soft_cap is not None:
        scores = terms.soft_cap * jnp.tanh(scores / terms.soft_cap)
    if terms.slopes is not None:
        slopes = terms.slopes.reshape(K, G, 1, 1)
        scores -= slopes * distance[:, :, None].astype(wide)
    if terms.biases is not None:
        # Biases by distance key − query, from −reach to reach: [N, 2·reach + 1].
        reach = terms.biases.shape[1] // 2
        bias_index = (jnp.clip(-distance, -reach, reach) + reach)[:, :, None]
        kv_head = jnp.arange(K)[:, None, None, None]
        group_member = jnp.arange(G)[:, None, None]
        biases = terms.biases.reshape(K, G, -1)
        scores += biases[kv_head, group_member, bias_index]

    # A query sees tokens that are there, not later ones, and those in its window.
    is_seen = (distance >= 0) & (positions > 0)[:, :, None]
    is_seen &= rows.live[:, None, :, None]
    if terms.window is not None:
        is_seen &= distance < terms.window
    if terms.chunk is not None:
        is_seen &= distance <= query_positions % terms.chunk
    scores = jnp.where(is_seen[:, :, None], scores, -jnp.inf)

    # Softmax, with a sink's exponential in the sum where heads have one. A query that
    # sees nothing has weights of 0.
    sink = -jnp.inf
    if terms.sinks is not None:
        sink = terms.sinks.reshape(K, G, 1, 1)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    top = jnp.where(top == -jnp.inf, 0, top)  # −inf − −inf is NaN
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    weights /= jnp.where(total > 0, total, 1)

    if value is None:
        value = key[..., :value_dim]
    y = jnp.einsum(
        "nkgts,nksh->ntkgh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=wide,
    )
    weights_by_kv_head = weights.sum(axis=2)  # [n, K, T, S]
    y = y.reshape(n, T, N, -1).astype(q.dtype)
    if shared_axes:
        weights_by_kv_head = lax.psum(weights_by_kv_head, shared_axes)
    return y, weights_by_kv_head


def _rank_tokens(
    config: EvictingCacheConfig,
    positions: jax.Array,
    scores: jax.Array | None,
    lengths: jax.Array,
    terms: AttentionTerms,
) -> jax.Array:
    """Ranks tokens, fp32 [n, K, S], the higher the better; positions as of
    :func:`_attend_rows`, lengths int32 [n] the tokens of each row."""
    # Positions count from 1: a row's last token has position `ends`.
    ends = lengths[:, None, None]
    if isinstance(config, SinksCacheConfig):
        is_sink = positions <= config.num_sinks
        ranks = jnp.where(is_sink, jnp.inf, positions.astype(jnp.float32))
    else:
        assert scores is not None
        is_recent = positions > ends - config.recent
        ranks = jnp.where(is_recent, jnp.inf, scores)
    # The next token will not see what is behind its window or its chunk; scores are
    # positive.
    if terms.window is not None:
        ranks = jnp.where(positions > ends - terms.window + 1, ranks, -1.0)
    if terms.chunk is not None:
        ranks = jnp.where(positions > ends - ends % terms.chunk, ranks, -1.0)
    return jnp.where(positions > 0, ranks, -jnp.inf)


def _replace_one(
    cache: EvictingCache,
    tokens: _NewTokens,
    rows: RowTokens,
    terms: AttentionTerms,
    attend: _AttendRows,
) -> tuple[EvictingCache, jax.Array]:
    """Returns the cache with one token of each row in the place of another, then y [n,
    1, N, Hv]."""
    config = cache.config
    n, K, _ = cache.positions.shape

    # The place of the token that matters least, [n, K].
    lengths = rows.positions[:, 0] + 1
    ranks = _rank_tokens(config, cache.positions, cache.scores, lengths, terms)
    is_worst = ranks == ranks.min(axis=-1, keepdims=True)
    # Of equally bad ones the oldest, and an empty place before any.
    largest = jnp.iinfo(jnp.int32).max
    worst = jnp.where(is_worst, cache.positions, largest).argmin(axis=-1)
    row = jnp.where(rows.live, jnp.arange(n)[:, None], n)  # n: dropped
    index = row, jnp.arange(K), worst

    def overwrite_worst(array: jax.Array, new: jax.Array | float) -> jax.Array:
        """Puts a value [n, K, ...] in the place of the worst token."""
        return array.at[index].set(new, mode="drop")

    # Written before it is read: or XLA copies the whole.
    keys = overwrite_worst(cache.key, tokens.key[:, 0].astype(cache.key.dtype))
    values = None
    if cache.value is not None:
        assert tokens.value is not None
        values = overwrite_worst(
            cache.value, tokens.value[:, 0].astype(cache.value.dtype)
        )
    positions = overwrite_worst(cache.positions, rows.positions + 1)
    scores = None if cache.scores is None else overwrite_worst(cache.scores, 0.0)
    y, weights = attend(tokens.q, keys, values, positions, rows)
    if isinstance(config, HeavyHittersCacheConfig):
        assert scores is not None
        scores += weights[:, :, 0]
    return EvictingCache(keys, values, positions, scores, config), y


def _keep_best(
    cache: EvictingCache,
    tokens: _NewTokens,
    rows: RowTokens,
    *,
    terms: AttentionTerms,
    attend: _AttendRows,
) -> tuple[EvictingCache, jax.Array]:
    """Returns the cache with the best of what it has and of a chunk of each row, the
    last ones first, and y [n, T, N, Hv]."""
    config = cache.config
    n, K, M = cache.positions.shape
    T = tokens.q.shape[1]
    new_positions = jnp.where(rows.live, rows.positions + 1, 0)  # [n, T]
    lengths = new_positions.max(axis=1)
    new_positions = jnp.broadcast_to(new_positions[:, None], (n, K, T))

    # Everything kept, then everything new, [n, K, M + T, ...].
    all_keys = _append_tokens(cache.key, tokens.key)
    all_values = None
    if cache.value is not None:
        assert tokens.value is not None
        all_values = _append_tokens(cache.value, tokens.value)
    positions = jnp.concatenate([cache.positions, new_positions], axis=-1)
    y, weights = attend(tokens.q, all_keys, all_values, positions, rows)

    # Newest first, so that SnapKV pools over neighbours and ties go to newer tokens.
    order = jnp.argsort(-positions, axis=-1, stable=True)
    positions = jnp.take_along_axis(positions, order, axis=-1)
    scores = None
    if cache.scores is not None:
        # Scores [n, K, M + T]: the weights that queries of this chunk gave.
        if isinstance(config, SnapKVCacheConfig):
            # The last tokens alone choose (SnapKV's observation window).
            is_choosing = rows.positions >= lengths[:, None] - config.recent
            weights = weights * is_choosing[:, None, :, None]
        scores = weights.sum(axis=2)
        if isinstance(config, HeavyHittersCacheConfig):
            # H2O sums over all queries, those of earlier steps too.
            scores = scores.at[..., :M].add(cache.scores)
        scores = jnp.take_along_axis(scores, order, axis=-1)
        if isinstance(config, SnapKVCacheConfig):
            scores = _average_neighbours(scores, config.pooling)

    # The M best, still newest first: their indices among the sorted, then among all.
    ranks = _rank_tokens(config, positions, scores, lengths, terms)
    _, best = lax.top_k(ranks, M)
    best = jnp.sort(best, axis=-1)
    best_unsorted = jnp.take_along_axis(order, best, axis=-1)[..., None]
    keys = jnp.take_along_axis(all_keys, best_unsorted, axis=2)
    values = None
    if all_values is not None:
        values = jnp.take_along_axis(all_values, best_unsorted, axis=2)
    positions = jnp.take_along_axis(positions, best, axis=-1)
    if scores is not None:
        scores = jnp.take_along_axis(scores, best, axis=-1)
    return EvictingCache(keys, values, positions, scores, config), y


def _average_neighbours(scores: jax.Array, count: int) -> jax.Array:
    """Averages scores [n, K, S] over ``count`` neighbours along S; beyond the ends are
    zeros."""
    window_shape = (1, 1, count)
    sums = lax.reduce_window(scores, 0.0, lax.add, window_shape, (1, 1, 1), "SAME")
    return sums / count


def _append_tokens(cached: jax.Array, new: jax.Array) -> jax.Array:
    """[n, K, M, H] and new tokens' [n, T, K, H] → [n, K, M + T, H]."""
    new = new.swapaxes(1, 2).astype(cached.dtype)
    return jnp.concatenate([cached, new], axis=2)


def _skip_if_empty(
    keep_best: Callable[
        [EvictingCache, _NewTokens, RowTokens], tuple[EvictingCache, jax.Array]
    ],
    cache: EvictingCache,
    tokens: _NewTokens,
    row: RowTokens,
) -> tuple[EvictingCache, jax.Array]:
    """Runs ``keep_best`` for one row, unless it has no token."""
    one_row = jax.tree.map(lambda x: x[None], (cache, tokens, row))
    _, y_shape = jax.eval_shape(keep_best, *one_row)

    def keep_all(
        cache: EvictingCache, tokens: _NewTokens, row: RowTokens
    ) -> tuple[EvictingCache, jax.Array]:
        return cache, jnp.zeros(y_shape.shape, y_shape.dtype)

    result = lax.cond(row.live.any(), keep_best, keep_all, *one_row)
    return jax.tree.map(lambda x: x[0], result)
