"""A cache of sparse attention: vectors of latent attention in pages, and in pages of the
same tables the keys by which an indexer chooses among them (DeepSeek-V3.2, arXiv
2512.02556, §2.1).

Shapes: D shards of the batch, S tokens of a step, N query heads, C latent dims and P
rotary dims of a vector, I heads of the indexer and J their size, L tokens that a page
table has room for, n tokens of a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.models.caches.paged import pad_features
from maxlm.models.caches.ragged import RaggedBatch
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules
from pallas_kernels.paged_attention import write_pages

_TILE = 8
"""Tokens whose indexer's scores with all keys, and chosen vectors, are in memory at
once."""


class IndexTokens(NamedTuple):
    """The indexer's arrays of tokens [B, S, ...], or [D, S, ...]."""

    query: jax.Array
    """[..., I, J]."""
    key: jax.Array
    """[..., J]."""
    weight: jax.Array
    """fp32 [..., I], of the heads' scores."""


class SparseCache(NamedTuple):
    """Vectors [D, pages, 1, page, C + P] and the indexer's keys [D, pages, 1, page,
    J]."""

    key: jax.Array
    index_key: jax.Array

    @property
    def value(self) -> None:
        """A token's value is the beginning of its vector."""
        return None

    def attend_chosen(
        self,
        q: jax.Array,
        key: jax.Array,
        index: IndexTokens,
        batch: RaggedBatch,
        *,
        rules: AxisRules,
        scale: float,
        top_k: int | None,
        value_dim: int,
    ) -> tuple[jax.Array, "SparseCache"]:
        """Attends to those ``top_k`` of each sequence's earlier tokens and these that
        the indexer scores highest, each device with its own sequences and heads.

        Args:
            q: [D, S, N, C + P], split as heads are.
            key: [D, S, 1, C + P].
            index: of the tokens, whole on the devices that share heads.
            top_k: None: all.
            value_dim: C.

        Returns:
            [D, S, N, C], and the cache with these tokens in it.
        """
        q_spec = rules.spec("batch", None, "heads")
        row_spec = rules.spec("batch")
        run = map_shards(
            partial(_attend_shard, scale=scale, top_k=top_k, value_dim=value_dim),
            (q_spec, row_spec, row_spec, row_spec, row_spec),
            (q_spec, row_spec),
        )
        key = reshard(key, row_spec)
        index = jax.tree.map(lambda x: reshard(x, row_spec), index)
        return run(reshard(q, q_spec), key, index, self, batch)


def _attend_shard(
    q: jax.Array,
    key: jax.Array,
    index: IndexTokens,
    cache: SparseCache,
    batch: RaggedBatch,
    *,
    scale: float,
    top_k: int | None,
    value_dim: int,
) -> tuple[jax.Array, SparseCache]:
    """Does what :meth:`SparseCache.attend_chosen` does on one device, whose part of D
    is 1."""
    q, key, index, cache, batch = jax.tree.map(
        lambda x: x[0], (q, key, index, cache, batch)
    )
    slots, page_tables = batch.pages(None)
    vectors = write_pages(cache.key, pad_features(key, cache.key.shape[-1]), slots)
    index_key = pad_features(index.key[:, None], cache.index_key.shape[-1])
    index_keys = write_pages(cache.index_key, index_key, slots)

    # Each token's sequence; tokens behind the last are padding.
    num_tokens = len(q)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(batch.query_starts[1:], token, side="right")
    last_sequence = len(batch.kv_lengths) - 1
    is_live = sequence <= last_sequence
    sequence = jnp.minimum(sequence, last_sequence)
    is_live &= batch.positions < batch.kv_lengths[sequence]

    page_size = vectors.shape[2]
    # [pages · page, ...]: rows of tokens.
    vector_rows = vectors.reshape(-1, vectors.shape[-1])
    index_rows = index_keys.reshape(-1, page_size, index_keys.shape[-1])
    key_size = q.shape[-1]
    index_size = index.query.shape[-1]

    def attend_tile(
        tile: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> jax.Array:
        q, index_q, index_weight, tables, positions, is_live = tile
        n = len(q)
        # [n, L, J], in the order of positions.
        keys = index_rows[tables].reshape(n, -1, index_rows.shape[-1])
        keys = keys[..., :index_size]
        products = jnp.einsum(
            "nij,nlj->nil", index_q, keys, preferred_element_type=index_weight.dtype
        )
        scores = jnp.einsum("nil,ni->nl", jax.nn.relu(products), index_weight)
        place = jnp.arange(keys.shape[1], dtype=jnp.int32)
        is_seen = (place <= positions[:, None]) & is_live[:, None]
        scores = jnp.where(is_seen, scores, -jnp.inf)
        # Of equal scores the earliest token's comes first.
        num_chosen = min(top_k or keys.shape[1], keys.shape[1])
        best_scores, best = lax.top_k(scores, num_chosen)

        # The chosen vectors, [n, k, C + P].
        page = jnp.take_along_axis(tables, best // page_size, axis=1)
        chosen = vector_rows[page * page_size + best % page_size][..., :key_size]
        wide = index_weight.dtype
        weights = jnp.einsum("nhc,nkc->nhk", q, chosen, preferred_element_type=wide)
        is_chosen = (best_scores > -jnp.inf)[:, None]
        weights = jnp.where(is_chosen, weights * scale, -jnp.inf)
        top = weights.max(axis=-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(weights - top)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= jnp.where(total > 0, total, 1)
        values = chosen[..., :value_dim]
        y = jnp.einsum(
            "nhk,nkc->nhc",
            weights.astype(values.dtype),
            values,
            preferred_element_type=wide,
        )
        return y.astype(q.dtype)

    missing = -num_tokens % _TILE

    def split(x: jax.Array) -> jax.Array:
        """[S, ...] → [tiles, n, ...]."""
        x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, _TILE, *x.shape[1:])

    tokens = (
        q,
        index.query,
        index.weight,
        page_tables[sequence],
        batch.positions,
        is_live,
    )
    y = lax.map(attend_tile, jax.tree.map(split, tokens))
    y = y.reshape(-1, *y.shape[2:])[:num_tokens]
    new_cache = SparseCache(vectors, index_keys)
    return jax.tree.map(lambda x: x[None], (y, new_cache))
