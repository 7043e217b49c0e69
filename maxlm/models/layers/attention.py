"""Multi-head attention: multi-query, grouped and full, with an optional key-value cache."""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.layers.linear import Linear, apply_together, residual_std
from maxlm.models.layers.positions import Rotary, rotate
from maxlm.parallel.attention import sharded_attention, write_slots
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class AttentionConfig(Config):
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads: num_heads for multi-head, 1 for multi-query, between for grouped
    (smaller caches, a little less quality)."""
    head_dim: int = Field(gt=0)
    bias: bool = False
    """Offsets on all four projections (GPT-2)."""
    window: int | None = Field(default=None, gt=0)
    """How many tokens a token sees: itself and the window − 1 before it (Mistral's sliding window);
    cost then grows with the window, not the sequence. null: all before it."""

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.num_heads % self.num_kv_heads:
            raise MaxlmError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
                fix="let every kv head serve as many query heads as the others",
            )
        return self


class KVCache(NamedTuple):
    """Keys and values of one layer, [B, T, K, H]; slot t holds position t."""

    key: jax.Array
    value: jax.Array


class Attention(nnx.Module):
    """Attention (Vaswani et al. 2017, §3.2.2) with grouped kv heads (Ainslie et al. 2023)."""

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig,
    ):
        self.rules, self.window, self.parallel = rules, config.window, parallel
        outer = {"embed": d_model}
        queries = {"heads": config.num_heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        kw: dict[str, Any] = {"bias": config.bias, "rules": rules, "dtype": dtype}
        self.query = Linear(outer, queries, std=init_std, **kw)
        self.key = Linear(outer, keys, std=init_std, **kw)
        self.value = Linear(outer, keys, std=init_std, **kw)
        self.out = Linear(queries, outer, std=residual_std(init_std, num_layers), **kw)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        rotary: Rotary | None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Causal self-attention; a sequence split over devices stands in the order of
        ``maxlm.parallel.context.sequence_order``.

        Args:
            x: [B, S, D].
            positions: int [B, S]; with a cache, the slots these tokens are written to.
            segment_ids: int [B, S], 0 for padding; None: all one segment.
            cache: keys and values of earlier tokens; the returned one holds these too.

        Returns:
            [B, S, D], and the cache (None if none was given).
        """
        q, k, v = apply_together(x, self.query, self.key, self.value)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
        attend = partial(sharded_attention, rules=self.rules, window=self.window)
        if cache is None:
            segments = None if segment_ids is None else (segment_ids, segment_ids)
            own = self.parallel
            y = attend(
                q, k, v, segment_ids=segments, method=own.context, balanced=own.balance_sequence
            )
        else:
            new = KVCache(k, v)
            write = partial(write_slots, positions=positions, rules=self.rules)
            cache = KVCache(*map(write, cache, new))
            # Slots not yet written lie after every query, so the causal mask hides them too.
            y = attend(q, cache.key, cache.value, q_positions=positions)
        return self.out(y, seq="residual"), cache
