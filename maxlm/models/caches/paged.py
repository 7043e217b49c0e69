"""Attention over a cache on a mesh, and pages of keys and values in the compute
dtype."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.models.caches.ragged import RaggedBatch, run_rows
from maxlm.parallel.local import axis_size, map_shards
from maxlm.parallel.ulysses import count_kv_copies
from maxlm.sharding import AxisRules
from pallas_kernels.attention import attention_forward
from pallas_kernels.paged_attention import paged_attention, write_pages


class AttentionCache:
    """Keys and values of sequences' earlier tokens, in arrays [D, ...]."""

    key: Any
    copies_heads: ClassVar[bool] = False
    """Whether it is split as query heads are, with copies of fewer kv heads."""

    def attend_shard(
        self,
        q: jax.Array,
        key: jax.Array,
        value: jax.Array | None,
        batch: RaggedBatch,
        rules: AxisRules,
        **options: Any,
    ) -> tuple[jax.Array, Self]:
        """Does what :meth:`attend` does for one shard; no array has the axis D."""
        raise NotImplementedError

    def attend(
        self,
        q: jax.Array,
        key: jax.Array | None,
        value: jax.Array | None,
        batch: RaggedBatch,
        *,
        rules: AxisRules,
        slopes: Any = None,
        biases: jax.Array | None = None,
        sinks: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, Self]:
        """Attends to each sequence's earlier tokens and these, each device with its own
        sequences and heads; returns also the cache with these.

        Args:
            q: [D, S, N, H].
            key, value: [D, S, K, H] and [D, S, K, Hv]; no value: it is part of the key.
            slopes, biases, sinks: [N], [N, 2R + 1] and [N].
            options: ``window``, ``scale``, ``soft_cap`` and ``value_dim`` of
                ``pallas_kernels.paged_attention``.

        Returns:
            [D, S, N, Hv], and the cache.
        """
        options["scale"] = options.get("scale") or q.shape[-1] ** -0.5

        def run(head_terms, *sharded):
            q, key, value, cache, batch = jax.tree.map(lambda x: x[0], sharded)
            found = cache.attend_shard(
                q, key, value, batch, rules, **head_terms, **options
            )
            return jax.tree.map(lambda x: x[None], found)

        split = rules.spec("batch", None, "heads")
        if (
            rules.heads and not rules.kv_heads
        ):  # devices have all keys, not only their queries' own
            if self.copies_heads and key is not None and value is not None:
                key, value = copy_kv_heads(key, rules), copy_kv_heads(value, rules)
                rules = rules.model_copy(update={"kv_heads": rules.heads})
            elif (self.key if key is None else key).shape[-2] > 1:
                rules = rules.model_copy(
                    update={"heads": ()}
                )  # each attends for all heads
        heads, own_heads = rules.spec("batch", None, "heads"), rules.spec("heads")
        keys = rules.spec("batch", None, "kv_heads")
        layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, self)
        head_terms = {
            name: None if x is None else reshard(jnp.asarray(x, jnp.float32), own_heads)
            for name, x in (("slopes", slopes), ("biases", biases), ("sinks", sinks))
        }
        specs = own_heads, heads, keys, keys, layout, rules.spec("batch")
        run = map_shards(run, specs, (heads, layout))
        y, cache = run(head_terms, reshard(q, heads), key, value, self, batch)
        return reshard(y, split), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(AttentionCache):
    """Keys and values in pages [D, P, K, page, H], which sequences hold by tables, and
    share where they begin alike."""

    key: Any
    value: Any
    """None: a token's value is the beginning of its key."""
    copies_heads = True

    def attend_shard(self, q, key, value, batch, rules, *, window, **options):
        """See :class:`AttentionCache`."""
        slots, tables = batch.pages(window)
        num_values = options["value_dim"] if value is None else value.shape[-1]
        q, key = (pad_features(x, self.key.shape[-1]) for x in (q, key))
        keys = write_pages(self.key, key, slots)
        values = self.value
        if value is not None:
            values = write_pages(values, pad_features(value, values.shape[-1]), slots)
        rows = tables, batch.kv_lengths, batch.query_starts
        y, _ = paged_attention(
            q,
            keys,
            values,
            *rows,
            uniform_rows=batch.uniform_rows,
            window=window,
            kernel=batch.attention_kernel,
            **options,
        )
        return y[..., :num_values], PagedCache(keys, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache(AttentionCache):
    """Keys and values [D, R, T, K, H] of the encoder's output that each row's tokens
    look up; new tokens have none."""

    key: Any
    value: Any
    segment_ids: Any
    """int32 [D, R, T]: 1 for an input's tokens, 0 behind them."""

    def attend_shard(self, q, key, value, batch, rules, *, slopes, biases, **options):
        """See :class:`AttentionCache`."""

        def advance(own, q, where):
            segments = jnp.ones(q.shape[:2], jnp.int32), own.segment_ids
            how = {"segment_ids": segments, "causal": False, **options}
            return None, attention_forward(q, own.key, own.value, **how)[0]

        return run_rows(advance, self, q, batch)[1], self


def copy_kv_heads(x: jax.Array, rules: AxisRules) -> jax.Array:
    """Copies kv heads x [D, S, K, H], whole on each device, until they divide over the
    devices of query heads; returns [D, S, copies · K, H], split so."""
    copies = count_kv_copies(x.shape[2], axis_size(rules.heads))
    x = jnp.repeat(x, copies, axis=2, out_sharding=rules.spec("batch"))
    return reshard(x, rules.spec("batch", None, "heads"))


def pad_features(x: jax.Array, size: int) -> jax.Array:
    """Pads the last dimension with zeros up to ``size``."""
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, size - x.shape[-1])))
