"""Multi-head attention: multi-query, grouped and full, with an optional key-value cache."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.caches import CacheLayout, RaggedBatch, kv_cache_spec
from maxlm.models.costs import AttentionCosts, FeatureKind, LayerCosts, MatrixGroup
from maxlm.models.layers.linear import Linear, compute_residual_std, project
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import replace_virtual
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class LatentConfig(Config):
    """Latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): keys and values of all heads come
    from one narrow vector a token, which is all that generation keeps. ``head_dim`` is then of
    queries and keys: a part without positions, and the last ``rotary_dim`` with."""

    q_rank: int | None = Field(default=None, gt=0)
    """Width that queries are squeezed through; null: they are not."""
    kv_rank: int = Field(gt=0)
    """Width of the vector that keys and values come from."""
    rotary_dim: int = Field(gt=0)
    """Dimensions of a head that RoPE turns; their keys are shared by all heads."""
    value_dim: int = Field(gt=0)
    """Size of a value head."""


class AttentionConfig(Config):
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads: num_heads for multi-head, 1 for multi-query, between for grouped
    (smaller caches, a little less quality)."""
    head_dim: int = Field(gt=0)
    bias: bool = False
    """Offsets on the projections to queries, keys and values (GPT-2, Qwen2)."""
    out_bias: bool | None = None
    """Offsets on the projection back; null: as ``bias``."""
    window: int | None = Field(default=None, gt=0)
    """Tokens that a token sees: itself and the window − 1 before it (Mistral's sliding window);
    cost then grows with the window, not the sequence. null: all before it."""
    scale: float | None = Field(default=None, gt=0)
    """Factor on q·k; null: head_dim^−0.5."""
    soft_cap: float | None = Field(default=None, gt=0)
    """Scores become cap·tanh(score / cap) (Gemma 2, Grok-1)."""
    qk_norm: bool = False
    """Normalise each query and key head, by the model's kind of norm (Qwen3, Gemma 3)."""
    clip: float | None = Field(default=None, gt=0)
    """Cut queries, keys and values off at ± this (DBRX)."""
    latent: LatentConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self):
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            what = f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}"
            raise MaxlmError(what, fix="let every kv head serve as many query heads as the others")
        if self.latent is None:
            return self
        if kv_heads != heads:
            what = f"latent attention with num_kv_heads={kv_heads} of {heads} heads"
            fix = "every query head has its own keys there: set it to num_heads"
            raise MaxlmError(what, fix=fix)
        if self.latent.rotary_dim >= self.head_dim:
            what = f"latent.rotary_dim={self.latent.rotary_dim} of head_dim={self.head_dim}"
            raise MaxlmError(what, fix="leave some dimensions without positions")
        if self.qk_norm or self.clip:
            raise MaxlmError("latent attention with qk_norm or clip", fix="leave them out")
        return self

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Attention of the same kind with small heads: the ratio of query to kv heads stays, up to
        8, and windows are a quarter of a sequence."""
        group = min(self.num_heads // self.num_kv_heads, 8)
        kv_heads = 1 if self.num_kv_heads == 1 else 2
        changes: dict[str, Any] = {
            "num_heads": group * kv_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "window": self.window and max(2, seq_len // 4),
        }
        if latent := self.latent:
            ranks = {"q_rank": latent.q_rank and head_dim, "kv_rank": head_dim}
            sizes = {"rotary_dim": head_dim // 2, "value_dim": head_dim}
            changes["latent"] = latent.model_copy(update={**ranks, **sizes})
        return self.model_copy(update=changes)

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.latent.value_dim if self.latent else self.head_dim


class KeysValues(NamedTuple):
    """Keys [B, T, K, H] and values [B, T, K, Hv] of one layer."""

    key: Any
    value: Any


class AttentionInputs(NamedTuple):
    """Inputs of a layer's mixer beside its hidden states."""

    positions: jax.Array
    """int [B, S]."""
    segment_ids: jax.Array | None
    """int [B, S], 0 for padding; None: all one segment."""
    rotary: Rotary | None
    slopes: jax.Array | None
    """fp32 [N], of ALiBi."""
    biases: jax.Array | None
    """fp32 [N, 2R+1], learnt, by distance."""
    scale: float
    """Factor on q·k."""
    window: int | None
    causal: bool
    batch: RaggedBatch | None = None
    """Sequences that the tokens continue, with a cache."""


class Attention(nnx.Module):
    """Attention (Vaswani et al. 2017, §3.2.2) with grouped kv heads (Ainslie et al. 2023)."""

    name = "attention"
    joint_projections = (("query", "key", "value"),)
    """Maps of the same input that are always applied together, in this order."""

    def __init__(
        self,
        config: AttentionConfig,
        norm: NormConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig,
    ):
        self.config, self.rules, self.parallel = config, rules, parallel
        outer = {"embed": d_model}
        queries = {"heads": config.num_heads, "head_dim": config.head_dim}
        keys = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        own: dict[str, Any] = {"rules": rules, "dtype": dtype}
        kw = {"bias": config.bias, "std": init_std, **own}
        self.query = Linear(outer, queries, **kw)
        self.key = Linear(outer, keys, **kw)
        self.value = Linear(outer, keys, **kw)
        self.query_norm = Norm(norm, config.head_dim, **own) if config.qk_norm else None
        self.key_norm = Norm(norm, config.head_dim, **own) if config.qk_norm else None
        std = compute_residual_std(init_std, num_layers)
        self.out = Linear(queries, outer, **kw | {"bias": config.has_out_bias, "std": std})

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """Self-attention of x [B, S, D]; see :class:`~maxlm.models.blocks.Mixer`. A sequence split
        over devices stands in the order of ``maxlm.parallel.context.sequence_order_indices``."""
        q, k, v = self._clipped(*project(x, self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if inputs.rotary is not None:
            q, k = rotate(q, inputs.rotary), rotate(k, inputs.rotary)
        k = replace_virtual(self.key.kernel, k, inputs.positions, self.rules)
        v = replace_virtual(self.value.kernel, v, inputs.positions, self.rules)
        q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
        scores = attention_kwargs(self.config, inputs, self.rules)
        if cache is None:
            own = self_attention_kwargs(inputs, self.parallel)
            y = sharded_attention(q, k, v, **scores, causal=inputs.causal, **own)
        else:
            y, cache = cache.attend(q, k, v, inputs.batch, **scores)
        return self.out(y, seq_axis="residual"), cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> Any:
        """A layer's cache; see :mod:`maxlm.models.caches`."""
        sizes = self.config.num_kv_heads, self.config.head_dim
        return kv_cache_spec(layout, window, sizes, sizes, "kv_heads")

    def costs(self, kv_input: FeatureKind = "residual") -> LayerCosts:
        """Counts costs of one layer whose keys and values are made of ``kv_input``; see
        :mod:`maxlm.models.costs`."""
        config, query, keys = self.config, ("query.kernel",), ("key.kernel", "value.kernel")
        raw = (*query, *keys) if config.clip is not None else ()
        raw = raw or ((*query, keys[0]) if config.qk_norm else ())
        if kv_input == "residual":
            inner = (MatrixGroup((*query, *keys), needs_raw_output=raw),)
        else:
            inner = MatrixGroup(query, needs_raw_output=raw), MatrixGroup(keys, kv_input, raw)
        sizes = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        heads = AttentionCosts(*sizes, qk_norm=config.qk_norm)
        return LayerCosts((*inner, MatrixGroup(("out.kernel",), "heads")), heads)

    def project_keys_values(self, encoder_states: jax.Array) -> KeysValues:
        """Projects an encoder's output [B, T, D] to keys and values for :meth:`cross_attend`."""
        k, v = self._clipped(*project(encoder_states, self.key, self.value))
        k = k if self.key_norm is None else self.key_norm(k)
        return KeysValues(checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv"))

    def cross_attend(
        self, x: jax.Array, keys: KeysValues, segment_ids: tuple[jax.Array, jax.Array] | None
    ) -> jax.Array:
        """Applies cross-attention to x [B, S, D]: every token sees all of an encoder's in its
        segment, without positions; ``segment_ids`` are int [B, S] and [B, T]."""
        (q,) = self._clipped(self.query(x))
        q = q if self.query_norm is None else self.query_norm(q)
        y = sharded_attention(
            checkpoint_name(q, "qkv"),
            keys.key,
            keys.value,
            rules=self.rules,
            causal=False,
            scale=self.config.scale,
            soft_cap=self.config.soft_cap,
            segment_ids=segment_ids,
        )
        return self.out(y, seq_axis="residual")

    def _clipped(self, *heads: jax.Array) -> tuple[jax.Array, ...]:
        clip = self.config.clip
        return heads if clip is None else tuple(jnp.clip(a, -clip, clip) for a in heads)


def attention_kwargs(
    config: AttentionConfig, inputs: AttentionInputs, rules: AxisRules
) -> dict[str, Any]:
    """Returns options of a layer's attention that do not depend on how keys are held."""
    return {
        "rules": rules,
        "window": inputs.window,
        "scale": inputs.scale,
        "soft_cap": config.soft_cap,
        "slopes": inputs.slopes,
        "biases": inputs.biases,
    }


def self_attention_kwargs(inputs: AttentionInputs, parallel: ParallelConfig) -> dict[str, Any]:
    """Returns options of tokens that attend to each other, without a cache."""
    segments = None if inputs.segment_ids is None else (inputs.segment_ids, inputs.segment_ids)
    return {
        "segment_ids": segments,
        "method": parallel.context,
        "balanced": parallel.balance_sequence,
    }
