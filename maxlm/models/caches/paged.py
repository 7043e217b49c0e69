"""Attention over a cache on a mesh, and pages of keys and values in the compute dtype.

Shapes: D shards of the batch, S tokens of a step, N query heads, K kv heads, H head
dim, Hv value dim, P pages, R rows.
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
    """Keys and values of sequences' earlier tokens, in arrays [D, ...]."""

    key: jax.Array
    copies_heads: ClassVar[bool] = False
    """Whether it is split as query heads are, with copies of fewer kv heads."""

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
        scale of ``terms`` is set, and their arrays are those of this shard's heads."""
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
            key, value: [D, S, K, H] and [D, S, K, Hv]; no value: it is part of the key;
                no key: the cache stays as it is.
            value_dim: Hv, where there is no value.

        Returns:
            [D, S, N, Hv], and the cache.
        """
        out_spec = rules.spec("batch", None, "heads")
        if rules.heads and not rules.kv_heads:
            # Devices have all keys, not only those of their queries.
            if self.copies_heads and key is not None and value is not None:
                key = copy_kv_heads(key, rules)
                value = copy_kv_heads(value, rules)
                rules = rules.model_copy(update={"kv_heads": rules.heads})
            elif (self.key if key is None else key).shape[-2] > 1:
                # Each device attends for all heads.
                rules = rules.model_copy(update={"heads": ()})
        terms = replace(terms, scale=terms.scale or q.shape[-1] ** -0.5)

        def attend_local(head_terms, *sharded):
            q, key, value, cache, batch = jax.tree.map(lambda x: x[0], sharded)
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
        head_terms = HeadTerms(
            *(
                None
                if term is None
                else reshard(jnp.asarray(term, jnp.float32), head_spec)
                for term in terms.by_head
            )
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
        assert key is not None
        slots, page_tables = batch.pages(terms.window)
        # Pages have room for more features than a head has where a kernel reads whole
        # lanes (`CacheLayout.feature_multiple`).
        q = pad_features(q, self.key.shape[-1])
        key = pad_features(key, self.key.shape[-1])
        keys = write_pages(self.key, key, slots)
        values = self.value
        num_values = value_dim
        if value is not None:
            assert values is not None
            num_values = value.shape[-1]
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
            scale=terms.scale,
            soft_cap=terms.soft_cap,
            slopes=terms.slopes,
            biases=terms.biases,
            sinks=terms.sinks,
        )
        return y[..., :num_values], replace(self, key=keys, value=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache(AttentionCache):
    """Keys and values [D, R, T, K, H] of the encoder's output that each row's tokens
    look up; new tokens have none."""

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
