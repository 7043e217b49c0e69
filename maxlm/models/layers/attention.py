"""Multi-head attention: multi-query, grouped, full and latent, with an optional
key-value cache."""

from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.costs import AttentionCosts, FeatureKind, LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import Linear, compute_residual_std, project
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import declare, materialize, replace_virtual
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class LatentConfig(Config):
    """Latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): keys and values of all
    heads come from one narrow vector a token, which is all that generation keeps.
    ``head_dim`` is then of queries and keys: a part without positions, and the last
    ``rotary_dim`` with."""

    q_rank: int | None = Field(default=None, gt=0)
    """Width that queries are squeezed through; null: they are not."""
    kv_rank: int = Field(gt=0)
    """Width of the vector that keys and values come from."""
    rotary_dim: int = Field(gt=0)
    """Dimensions of a head that RoPE turns; their keys are shared by all heads."""
    value_dim: int = Field(gt=0)
    """Size of a value head."""


class AttentionConfig(Config):
    """Heads of attention, and how their scores become weights."""

    kind: ClassVar[str] = "attention"

    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads: num_heads for multi-head, 1 for multi-query, between for
    grouped (smaller caches, a little less quality)."""
    head_dim: int = Field(gt=0)
    bias: bool = False
    """Offsets on the projections to queries, keys and values (GPT-2, Qwen2)."""
    out_bias: bool | None = None
    """Offsets on the projection back; null: as ``bias``."""
    window: int | None = Field(default=None, gt=0)
    """Tokens that a token sees: itself and the window − 1 before it (Mistral's sliding
    window); cost then grows with the window, not the sequence. null: all before it."""
    scale: float | None = Field(default=None, gt=0)
    """Factor on q·k; null: head_dim^−0.5."""
    soft_cap: float | None = Field(default=None, gt=0)
    """Scores become cap·tanh(score / cap) (Gemma 2, Grok-1)."""
    qk_norm: bool = False
    """Normalise each query and key head, by the model's kind of norm (Qwen3, Gemma
    3)."""
    clip: float | None = Field(default=None, gt=0)
    """Cut queries, keys and values off at ± this (DBRX)."""
    sinks: bool = False
    """A learnt logit of each query head beside the scores in its softmax, whose weight
    goes to no token, so that a head can leave a token as it is (gpt-oss)."""
    latent: LatentConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self):
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            what = f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}"
            raise MaxlmError(
                what, fix="let every kv head serve as many query heads as the others"
            )
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
            raise MaxlmError(
                "latent attention with qk_norm or clip", fix="leave them out"
            )
        return self

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Attention of the same kind with small heads: the ratio of query to kv heads
        stays, up to 8, and windows are a quarter of a sequence."""
        kv_heads = 1 if self.num_kv_heads == 1 else 2
        changes: dict[str, Any] = {
            "num_heads": min(self.num_heads // self.num_kv_heads, 8) * kv_heads,
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


class EncoderOutput(NamedTuple):
    """An encoder's output, for the layers of a decoder."""

    states: jax.Array
    """[B, T, D]."""
    segment_ids: jax.Array | None
    """int [B, T]; None: each row is one segment."""


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
    """Attention (Vaswani et al. 2017, §3.2.2) with grouped kv heads (Ainslie et al.
    2023)."""

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
        self.sinks = declare_sinks(config)
        std = compute_residual_std(init_std, num_layers)
        self.out = Linear(
            queries, outer, **kw | {"bias": config.has_out_bias, "std": std}
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """Self-attention of x [B, S, D]; see :class:`~maxlm.models.blocks.Mixer`. A
        sequence split over devices stands in the order of
        ``maxlm.parallel.context.sequence_order_indices``."""
        q, k, v = self._clipped(*project(x, self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q = self.query_norm(q)
            k = self.key_norm(k)
        if inputs.rotary is not None:
            q, k = rotate(q, inputs.rotary), rotate(k, inputs.rotary)
        k = replace_virtual(self.key.kernel, k, inputs.positions, self.rules)
        v = replace_virtual(self.value.kernel, v, inputs.positions, self.rules)
        q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
        y, cache = attend(self, q, k, v, inputs, cache, self.rules)
        return self.out(y, seq_axis="residual"), cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> Any:
        """A layer's cache; see :mod:`maxlm.models.caches`."""
        size = self.config.head_dim
        return kv_cache_spec(layout, window, self.config.num_kv_heads, size, size)

    def costs(self, kv_input: FeatureKind = "residual") -> LayerCosts:
        """Counts costs of one layer whose keys and values are made of ``kv_input``; see
        :mod:`maxlm.models.costs`."""
        config = self.config
        query = ("query.kernel",)
        keys = ("key.kernel", "value.kernel")
        raw = (*query, *keys) if config.clip is not None else ()
        raw = raw or ((*query, keys[0]) if config.qk_norm else ())
        if kv_input == "residual":
            inner = (MatrixGroup((*query, *keys), needs_raw_output=raw),)
        else:
            inner = (
                MatrixGroup(query, needs_raw_output=raw),
                MatrixGroup(keys, kv_input, raw),
            )
        sizes = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        heads = AttentionCosts(*sizes, qk_norm=config.qk_norm)
        return LayerCosts((*inner, MatrixGroup(("out.kernel",), "heads")), heads)

    def project_keys_values(self, encoder_states: jax.Array) -> KeysValues:
        """Projects an encoder's output [B, T, D] to keys and values for
        :meth:`cross_attend`."""
        k, v = self._clipped(*project(encoder_states, self.key, self.value))
        k = k if self.key_norm is None else self.key_norm(k)
        return KeysValues(checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv"))

    def cross_attend(
        self, x: jax.Array, inputs: AttentionInputs, encoded: Any
    ) -> jax.Array:
        """Applies cross-attention to x [B, S, D]: every token sees all of an encoder's
        in its segment, without positions. ``encoded`` is an :class:`EncoderOutput` or,
        with a batch of sequences, a ``CrossCache``."""
        (q,) = self._clipped(self.query(x))
        q = checkpoint_name(q if self.query_norm is None else self.query_norm(q), "qkv")
        options: dict[str, Any] = {"rules": self.rules, "scale": self.config.scale}
        options |= {"soft_cap": self.config.soft_cap, "sinks": read_sinks(self)}
        if inputs.batch is not None:
            y, _ = encoded.attend(q, None, None, inputs.batch, **options)
        else:
            keys = self.project_keys_values(encoded.states)
            segments = inputs.segment_ids
            if encoded.segment_ids is not None:
                own = jnp.ones_like(inputs.positions) if segments is None else segments
                options["segment_ids"] = own, encoded.segment_ids
            y = sharded_attention(q, *keys, causal=False, **options)
        return self.out(y, seq_axis="residual")

    def _clipped(self, *heads: jax.Array) -> tuple[jax.Array, ...]:
        clip = self.config.clip
        return heads if clip is None else tuple(jnp.clip(a, -clip, clip) for a in heads)


class LatentAttention(nnx.Module):
    """Keys and values of every head from one vector a token (DeepSeek-V2, arXiv
    2405.04434, eq. 9–19).

    Parameters: ``query`` [D or q_rank, N, H], with q_rank behind ``query_down`` and
    ``query_norm``; ``key_down`` [D, kv_rank] with ``key_norm``; ``key_rotary`` [D, R],
    shared by all heads; ``key_up`` [kv_rank, N, H − R] and ``value_up`` [kv_rank, N,
    Hv]; ``out`` [N, Hv, D].
    """

    name = "attention"

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
        assert config.latent is not None
        self.config = config
        self.latent = config.latent
        self.parallel = parallel
        # Every query head has its own keys and values, where it is.
        self.rules = rules.model_copy(update={"kv_heads": rules.heads})
        # The vector is whole wherever heads are.
        self.shared_rules = rules.model_copy(update={"kv_heads": ()})
        latent = config.latent
        outer = {"embed": d_model}
        own: dict[str, Any] = {"rules": rules, "dtype": dtype}
        kw: dict[str, Any] = {"bias": False, "std": init_std, **own}
        down: dict[str, Any] = {**kw, "bias": config.bias}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        rank = latent.q_rank
        self.query_down = Linear(outer, {"latent": rank}, **down) if rank else None
        self.query_norm = Norm(norm, rank, **own) if rank else None
        self.query = Linear({"embed": rank} if rank else outer, heads, **kw)
        # Maps out of the vector are stored split as those out of the residual stream
        # are.
        vector = {"embed": latent.kv_rank}
        self.key_down = Linear(outer, {"latent": latent.kv_rank}, **down)
        self.key_norm = Norm(norm, latent.kv_rank, **own)
        self.key_rotary = Linear(outer, {"head_dim": latent.rotary_dim}, **down)
        plain = {
            "heads": config.num_heads,
            "head_dim": config.head_dim - latent.rotary_dim,
        }
        values = {"heads": config.num_heads, "head_dim": latent.value_dim}
        self.key_up = Linear(vector, plain, **kw)
        self.value_up = Linear(vector, values, **kw)
        self.sinks = declare_sinks(config)
        std = compute_residual_std(init_std, num_layers)
        self.out = Linear(
            values, outer, **{**kw, "bias": config.has_out_bias, "std": std}
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """See :class:`Attention`."""
        assert inputs.rotary is not None
        first = self.query if self.query_down is None else self.query_down
        q, vector, shared = project(x, first, self.key_down, self.key_rotary)
        if self.query_norm is not None:
            q = self.query(self.query_norm(q))
        plain = self.config.head_dim - self.latent.rotary_dim
        q, turned = q[..., :plain], rotate(q[..., plain:], inputs.rotary)
        vector = self.key_norm(vector)
        shared = rotate(shared[:, :, None], inputs.rotary)
        if cache is None:
            k, v = project(vector, self.key_up, self.value_up)
            of_all = (*k.shape[:3], shared.shape[-1])
            shared = jnp.broadcast_to(
                shared, of_all, out_sharding=jax.typeof(k).sharding
            )
            k = jnp.concatenate([k, shared], axis=-1)
            q = jnp.concatenate([q, turned], axis=-1)
            q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
            y, cache = attend(self, q, k, v, inputs, None, self.rules)
        else:
            # Attention without making keys and values: q·(U c) = (Uᵀ q)·c, and Σ w (V
            # c) = V Σ w c (§2.1.2), so that a token reads kv_rank + R numbers of each
            # earlier one.
            q = self._through(q, self.key_up, "bsnh,rnh->bsnr")
            q = jnp.concatenate([q, turned], axis=-1)
            k = jnp.concatenate([vector[:, :, None], shared], axis=-1)
            rank = self.latent.kv_rank
            y, cache = attend(
                self, q, k, None, inputs, cache, self.shared_rules, value_dim=rank
            )
            y = self._through(y, self.value_up, "bsnr,rnh->bsnh")
        return self.out(y, seq_axis="residual"), cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> Any:
        """A layer's cache of vectors with the shared rotary keys behind them;
        attention's values are the vectors."""
        return kv_cache_spec(
            layout, window, 1, self.latent.kv_rank + self.latent.rotary_dim, None
        )

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        squeezed = self.query_down is not None
        first = "query_down.kernel" if squeezed else "query.kernel"
        groups = [
            MatrixGroup((first, "key_down.kernel", "key_rotary.kernel")),
            MatrixGroup(("key_up.kernel", "value_up.kernel"), "latent"),
            MatrixGroup(("out.kernel",), "heads"),
        ]
        if squeezed:
            groups.append(MatrixGroup(("query.kernel",), "latent"))
        sizes = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        return LayerCosts(
            tuple(groups), AttentionCosts(*sizes, "heads", self.latent.rotary_dim)
        )

    def _through(self, x: jax.Array, map_: Linear, maths: str) -> jax.Array:
        kernel = materialize(map_.kernel, self.rules, map_.dtype)
        heads = self.rules.spec("batch", "seq", "heads", None)
        return jnp.einsum(maths, x, kernel, out_sharding=heads)


def declare_sinks(config: AttentionConfig) -> nnx.Param | None:
    """Declares a layer's sinks [N], where it has any."""
    shape = (config.num_heads,)
    zeros = jax.nn.initializers.zeros
    return declare(shape, ("heads",), zeros, "vector") if config.sinks else None


def read_sinks(layer: Any) -> jax.Array | None:
    """Returns a layer's sinks [N] in fp32 or wider, split as heads are; None: it has
    none."""
    wide = accumulation_dtype(layer.out.dtype)
    return None if layer.sinks is None else materialize(layer.sinks, layer.rules, wide)


def attend(
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: Any,
    inputs: AttentionInputs,
    cache: Any,
    rules: AxisRules,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Attends to these tokens and a cache's, if there is one; returns also the cache
    with these. ``layer``: with a ``config``, ``sinks``, ``rules`` and ``parallel``.
    ``options``: further ones of the cache's ``attend``."""
    options |= {"rules": rules, "window": inputs.window, "scale": inputs.scale}
    options |= {
        "soft_cap": layer.config.soft_cap,
        "slopes": inputs.slopes,
        "biases": inputs.biases,
    }
    options["sinks"] = read_sinks(layer)
    if cache is not None:
        return cache.attend(q, k, v, inputs.batch, **options)
    segments = inputs.segment_ids
    options["segment_ids"] = None if segments is None else (segments, segments)
    own = {
        "method": layer.parallel.context,
        "balanced": layer.parallel.balance_sequence,
    }
    return sharded_attention(q, k, v, causal=inputs.causal, **own, **options), None
