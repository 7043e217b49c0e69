"""Attention over a cache on a mesh: the base class of all caches that attention reads,
pages of keys and values in the compute dtype, and the keys of an encoder's output.

Shapes: D shards of the batch, S tokens of a step, N query heads, K kv heads, H head
dim, Hv value dim, P pages, R rows, T tokens of an encoder's input, b + F sequences of a
step (rows that decode, and chunks of prompts), M pages of a page table.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.models.caches.ragged import RaggedBatch, RowTokens, run_rows
from maxlm.parallel.local import axis_size, map_shards
from maxlm.parallel.terms import AttentionTerms, HeadTerms
from maxlm.parallel.ulysses import count_kv_copies
from maxlm.sharding import AxisRules
from pallas_kernels.attention import attention_forward
from pallas_kernels.paged_attention import paged_attention, write_pages


class AttentionCache:
    """Keys and values of sequences' earlier tokens, in arrays [D, ...]. Subclasses say
    how one shard stores them and attends to them."""

    key: jax.Array
    value: jax.Array | None
    """None: all query heads share one head of keys, of which values are a part."""
    copies_heads: ClassVar[bool] = False
    """Whether the cache may be split over the devices of the query heads where kv heads
    are too few for them: it then stores a copy of a kv head on each device whose
    queries read it. False: every device stores all kv heads."""
    knows_chunks: ClassVar[bool] = False
    """Whether the cache masks tokens of other chunks (``AttentionTerms.chunk``)."""
    can_be_shared: ClassVar[bool] = False
    """Whether layers can read it to which it does not belong, once it has a step's
    tokens: :meth:`attend` without a key."""

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
        """Does what :meth:`attend` does for one shard; no array has the axis D. The
        scale of ``terms`` is set, and its arrays (slopes, biases, sinks) have an entry
        for each of this shard's query heads."""
        raise NotImplementedError

    def attend(
        self,
        q: jax.Array,
        key: jax.Array | None,
        value: jax.Array | None,
        batch: RaggedBatch,
        terms: AttentionTerms,
        *,
        rules: AxisRules,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, Self]:
        """Attends to each sequence's earlier tokens and these, each device with its own
        sequences and heads; returns also the cache with these.

        Args:
            q: [D, S, N, H].
            key, value: [D, S, K, H] and [D, S, K, Hv]. No value: it is the beginning of
                the key, as in latent attention (MLA). No key: there is nothing to
                store, as in attention to an encoder's output.
            value_dim: Hv, where there is no value; None without a key: as many as the
                queries have.

        Returns:
            [D, S, N, Hv], and the cache.
        """
        out_spec = rules.spec("batch", None, "heads")
        if rules.heads and not rules.kv_heads:
            # Query heads are split over devices, and each device has the new keys of
            # all kv heads, not only of those that its queries read.
            stored_or_new_key = self.key if key is None else key
            num_kv_heads = stored_or_new_key.shape[-2]
            if self.copies_heads and key is not None and value is not None:
                key = copy_kv_heads(key, rules)
                value = copy_kv_heads(value, rules)
                rules = rules.model_copy(update={"kv_heads": rules.heads})
            elif self.copies_heads and key is None:
                # Another layer has stored the copies.
                rules = rules.model_copy(update={"kv_heads": rules.heads})
            elif num_kv_heads > 1:
                # Each device attends for all query heads.
                rules = rules.model_copy(update={"heads": ()})
            # A single kv head is read by all query heads: they may stay split.
        terms = replace(terms, scale=terms.scale or q.shape[-1] ** -0.5)

        def attend_local(
            head_terms: HeadTerms, *arrays: object
        ) -> tuple[jax.Array, Self]:
            # A device sees its shard of the arrays with a leading axis of size 1.
            q, key, value, cache, batch = jax.tree.map(lambda x: x[0], arrays)
            y_and_cache = cache.attend_shard(
                q,
                key,
                value,
                batch,
                terms.with_head_terms(head_terms),
                rules=rules,
                value_dim=value_dim,
            )
            return jax.tree.map(lambda x: x[None], y_and_cache)

        q_spec = rules.spec("batch", None, "heads")
        kv_spec = rules.spec("batch", None, "kv_heads")
        head_spec = rules.spec("heads")
        cache_specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self)

        def split_by_head(term: jax.Array | None) -> jax.Array | None:
            if term is None:
                return None
            return reshard(jnp.asarray(term, jnp.float32), head_spec)

        head_terms = HeadTerms(
            slopes=split_by_head(terms.slopes),
            biases=split_by_head(terms.biases),
            sinks=split_by_head(terms.sinks),
        )
        in_specs = (
            head_spec,
            q_spec,
            kv_spec,
            kv_spec,
            cache_specs,
            rules.spec("batch"),
        )
        run = map_shards(attend_local, in_specs, (q_spec, cache_specs))
        y, cache = run(head_terms, reshard(q, q_spec), key, value, self, batch)
        return reshard(y, out_spec), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(AttentionCache):
    """Keys and values in pages [D, P, K, page, H], which sequences hold by tables, and
    share where they begin alike."""

    key: jax.Array
    value: jax.Array | None
    """None: a token's value is the beginning of its key."""
    copies_heads = True
    knows_chunks = True
    can_be_shared = True

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
        """See :class:`AttentionCache`."""
        # slots [S], page_tables [b + F, M].
        slots, page_tables = batch.pages(terms.window)
        # Pages have room for more features than a head has where a kernel reads whole
        # lanes (`CacheLayout.feature_multiple`).
        page_features = self.key.shape[-1]
        output_dim = value_dim or q.shape[-1]
        q = pad_features(q, page_features)
        keys = self.key
        values = self.value
        if key is not None:
            keys = write_pages(keys, pad_features(key, page_features), slots)
        if value is not None:
            assert values is not None
            output_dim = value.shape[-1]
            values = write_pages(values, pad_features(value, values.shape[-1]), slots)
        y, _ = paged_attention(
            q,
            keys,
            values,
            page_tables,
            batch.kv_lengths,
            batch.query_starts,
            uniform_rows=batch.uniform_rows,
            kernel=batch.attention_kernel,
            value_dim=value_dim,
            window=terms.window,
            chunk=terms.chunk,
            scale=terms.scale,
            soft_cap=terms.soft_cap,
            slopes=terms.slopes,
            biases=terms.biases,
            sinks=terms.sinks,
        )
        return y[..., :output_dim], replace(self, key=keys, value=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache(AttentionCache):
    """Keys and values [D, R, T, K, H] of the encoder's output that each row's tokens
    attend to (cross-attention); new tokens add none."""

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    """int32 [D, R, T]: 1 for an input's tokens, 0 behind them."""

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
        """See :class:`AttentionCache`."""

        def attend_rows(
            encoded: CrossCache, q: jax.Array, tokens: RowTokens
        ) -> tuple[None, jax.Array]:
            q_segments = jnp.ones(q.shape[:2], jnp.int32)
            y, _ = attention_forward(
                q,
                encoded.key,
                encoded.value,
                segment_ids=(q_segments, encoded.segment_ids),
                causal=False,
                scale=terms.scale,
                soft_cap=terms.soft_cap,
                sinks=terms.sinks,
            )
            # The encoder's keys stay as they are: there are no new ones to store.
            return None, y

        _, y = run_rows(attend_rows, self, q, batch)
        return y, self


def copy_kv_heads(x: jax.Array, rules: AxisRules) -> jax.Array:
    """Copies kv heads x [D, S, K, H], whole on each device, until they divide over the
    devices of query heads; returns [D, S, copies · K, H], split so."""
    copies = count_kv_copies(x.shape[2], axis_size(rules.heads))
    x = jnp.repeat(x, copies, axis=2, out_sharding=rules.spec("batch"))
    return reshard(x, rules.spec("batch", None, "heads"))


def pad_features(x: jax.Array, size: int) -> jax.Array:
    """Pads the last dimension with zeros up to ``size``."""
    leading = ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, (*leading, (0, size - x.shape[-1])))
