"""A fixed number of tokens of each sequence, whatever its length: StreamingLLM (Xiao et
al. 2024, arXiv 2309.17453), H2O (Zhang et al. 2023, arXiv 2306.14048), SnapKV (Li et
al. 2024, arXiv 2404.14469).

Each kv head chooses for itself. A new token takes the place of the one that matters
least, then attends to all that is kept; a chunk of a prompt is attended to in full,
then the best of it and of what was kept stay. Keys keep the rotary positions of their
tokens, also in StreamingLLM, which counts places in the cache instead. The current
token and the recent ones are never evicted, and what is behind a layer's window always
is first. A sequence within the budget is exact.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

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
from maxlm.models.caches.ragged import RowTokens, run_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvictingCache(AttentionCache):
    """M tokens of each row and kv head, in any order."""

    key: Any
    """[D, R, K, M, H]."""
    value: Any
    """[D, R, K, M, Hv]; None: a token's value is the beginning of its key."""
    positions: Any
    """int32 [D, R, K, M]: 1 and the token's position; 0: none."""
    scores: Any
    """fp32 [D, R, K, M]: weights that the token was given; None: they do not matter."""
    config: EvictingCacheConfig = field(metadata={"static": True})

    def attend_shard(self, q, key, value, batch, rules, *, window, **options):
        """See :class:`AttentionCache`. Where devices have heads that share keys, they
        add up the weights that these were given. Rows have no drafts
        (``check_speculation``): no token could be taken back.
        """
        shared = tuple(set(rules.mesh_axes("heads")) - set(rules.mesh_axes("kv_heads")))
        attend = partial(_attend_rows, shared=shared, window=window, **options)

        def advance(own, tokens, where):
            own = replace(
                own, positions=jnp.where(where.begins[:, None, None], 0, own.positions)
            )
            if tokens[0].shape[1] == 1:
                return _replace_one(own, tokens, where, window, attend)
            keep = partial(_keep_best, window=window, attend=attend)
            return lax.map(
                lambda chunk: _skip_if_empty(keep, *chunk), (own, tokens, where)
            )

        cache, y = run_rows(advance, self, (q, key, value), batch)
        return y, cache


def _attend_rows(
    q,
    key,
    value,
    positions,
    where: RowTokens,
    *,
    shared,
    window,
    slopes,
    biases,
    sinks,
    **options,
):
    """Attends with q [n, T, N, H] to key [n, K, S, H]; positions int32 [n, K, S] are 1
    and the token's, 0 for none. Returns y [n, T, N, Hv] and fp32 [n, K, T, S]: the
    weights, summed over the heads that share keys."""
    n, T, N, H = q.shape
    K = key.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    G = N // K
    q = q.reshape(n, T, K, G, H)
    scores = jnp.einsum("ntkgh,nksh->nkgts", q, key, preferred_element_type=wide)
    scores *= options["scale"]
    distance = where.positions[:, None, :, None] - (positions[:, :, None] - 1)
    cap = options.get("soft_cap")
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if slopes is not None:
        scores -= slopes.reshape(K, G, 1, 1) * distance[:, :, None].astype(wide)
    if biases is not None:
        reach = biases.shape[1] // 2
        at = (jnp.clip(-distance, -reach, reach) + reach)[:, :, None]
        head, member = jnp.arange(K)[:, None, None, None], jnp.arange(G)[:, None, None]
        scores += biases.reshape(K, G, -1)[head, member, at]
    seen = (distance >= 0) & (positions > 0)[:, :, None] & where.live[:, None, :, None]
    if window is not None:
        seen &= distance < window
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    sink = -jnp.inf if sinks is None else sinks.reshape(K, G, 1, 1)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top)
    weights /= jnp.where(total > 0, total, 1)
    value = key[..., : options["value_dim"]] if value is None else value
    near = weights.astype(value.dtype)
    y = jnp.einsum("nkgts,nksh->ntkgh", near, value, preferred_element_type=wide)
    weights = weights.sum(axis=2)
    return y.reshape(n, T, N, -1).astype(q.dtype), lax.psum(
        weights, shared
    ) if shared else weights


def _rank_tokens(config, keys, scores, ends, window):
    """fp32 [n, K, S], the higher the better; keys as of :func:`_mask_scores`, ends
    int32 [n] the tokens of each row."""
    ends = ends[:, None, None]
    if isinstance(config, SinksCacheConfig):
        ranks = jnp.where(keys <= config.num_sinks, jnp.inf, keys.astype(jnp.float32))
    else:
        ranks = jnp.where(keys > ends - config.recent, jnp.inf, scores)
    if window is not None:
        ranks = jnp.where(keys > ends - window + 1, ranks, -1.0)
    return jnp.where(keys > 0, ranks, -jnp.inf)


def _replace_one(cache: EvictingCache, tokens, where: RowTokens, window, attend):
    """The cache with one token of each row in the place of another, then y [n, 1, N,
    Hv]."""
    # Written before it is read: or XLA copies the whole.
    q, key, value = tokens
    (n, K, _), config = cache.positions.shape, cache.config
    ranks = _rank_tokens(
        config, cache.positions, cache.scores, where.positions[:, 0] + 1, window
    )
    worst = ranks == ranks.min(axis=-1, keepdims=True)
    slot = jnp.where(worst, cache.positions, jnp.iinfo(jnp.int32).max).argmin(axis=-1)
    at = jnp.where(where.live, jnp.arange(n)[:, None], n), jnp.arange(K), slot

    def write(held, new):
        return None if held is None else held.at[at].set(new, mode="drop")

    keys = write(cache.key, key[:, 0].astype(cache.key.dtype))
    values = write(
        cache.value, None if value is None else value[:, 0].astype(cache.value.dtype)
    )
    positions, scores = (
        write(cache.positions, where.positions + 1),
        write(cache.scores, 0.0),
    )
    y, weights = attend(q, keys, values, positions, where)
    if isinstance(config, HeavyHittersCacheConfig):
        scores += weights[:, :, 0]
    return EvictingCache(keys, values, positions, scores, config), y


def _keep_best(cache: EvictingCache, tokens, where: RowTokens, *, window, attend):
    """The cache with the best of what it has and of a chunk of each row, the last ones
    first, and y [n, T, N, Hv]."""
    (q, *new) = tokens
    config = cache.config
    n, K, M = cache.positions.shape
    T = q.shape[1]
    own = jnp.where(where.live, where.positions + 1, 0)
    ends = own.max(axis=1)
    own = jnp.broadcast_to(own[:, None], (n, K, T))
    both = [
        None
        if x is None
        else jnp.concatenate([x, y.swapaxes(1, 2).astype(x.dtype)], axis=2)
        for x, y in zip((cache.key, cache.value), new, strict=True)
    ]
    positions = jnp.concatenate([cache.positions, own], axis=-1)
    y, weights = attend(q, *both, positions, where)
    order = jnp.argsort(-positions, axis=-1, stable=True)
    positions = jnp.take_along_axis(positions, order, axis=-1)
    scores = None
    if cache.scores is not None:
        if isinstance(config, SnapKVCacheConfig):
            choosing = where.positions >= ends[:, None] - config.recent
            weights = weights * choosing[:, None, :, None]
        scores = weights.sum(axis=2)
        if isinstance(config, HeavyHittersCacheConfig):
            scores = scores.at[..., :M].add(cache.scores)
        scores = jnp.take_along_axis(scores, order, axis=-1)
        if isinstance(config, SnapKVCacheConfig):
            size = (1, 1, config.pooling)
            scores = lax.reduce_window(scores, 0.0, lax.add, size, (1, 1, 1), "SAME")
            scores /= config.pooling
    _, best = lax.top_k(_rank_tokens(config, positions, scores, ends, window), M)
    best = jnp.sort(best, axis=-1)
    chosen = jnp.take_along_axis(order, best, axis=-1)[..., None]
    keys, values = (
        None if x is None else jnp.take_along_axis(x, chosen, axis=2) for x in both
    )
    positions = jnp.take_along_axis(positions, best, axis=-1)
    if scores is not None:
        scores = jnp.take_along_axis(scores, best, axis=-1)
    return EvictingCache(keys, values, positions, scores, config), y


def _skip_if_empty(keep, cache: EvictingCache, tokens, where: RowTokens):
    """``keep`` for one row, unless it has no token."""
    given = jax.tree.map(lambda x: x[None], (cache, tokens, where))
    shape = jax.eval_shape(keep, *given)[1]
    nothing = lambda own, *_: (own, jnp.zeros(shape.shape, shape.dtype))  # noqa: E731
    return jax.tree.map(
        lambda x: x[0], lax.cond(where.live.any(), keep, nothing, *given)
    )
