"""Multi-head attention: multi-query, grouped, full and latent, with an optional
key-value cache.

Shapes: B batch, S queries, T keys, D model, N query heads, K kv heads, H head dim, Hv
value dim; of latent attention C latent dims (``kv_rank``) and P rotary dims. R is the
largest distance with a learnt bias.
"""

from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.paged import AttentionCache, CrossCache
from maxlm.models.costs import AttentionCosts, FeatureKind, LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import declare, materialize, replace_virtual
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import AxisRules


class LatentConfig(Config):
    """Latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): keys and values of all
    heads come from one narrow vector a token, which is all that generation keeps.

    ``head_dim`` is then the size of query and key heads: the first ``head_dim −
    rotary_dim`` dimensions have no positions, RoPE turns the last ``rotary_dim``.
    """

    q_rank: int | None = Field(default=None, gt=0)
    """Width that queries are squeezed through; null: they are not."""
    kv_rank: int = Field(gt=0)
    """Width of the vector that keys and values come from."""
    rotary_dim: int = Field(gt=0)
    """Dimensions of a head that RoPE turns; all heads share that part of the key."""
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
        num_heads = self.num_heads
        num_kv_heads = self.num_kv_heads
        if num_heads % num_kv_heads:
            raise MaxlmError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}",
                fix="let every kv head serve as many query heads as the others",
            )
        if self.latent is None:
            return self
        if num_kv_heads != num_heads:
            raise MaxlmError(
                f"latent attention with num_kv_heads={num_kv_heads} of {num_heads} heads",
                fix="every query head has its own keys there: set it to num_heads",
            )
        rotary_dim = self.latent.rotary_dim
        if rotary_dim >= self.head_dim:
            raise MaxlmError(
                f"latent.rotary_dim={rotary_dim} of head_dim={self.head_dim}",
                fix="leave some dimensions without positions",
            )
        if self.qk_norm or self.clip:
            raise MaxlmError(
                "latent attention with qk_norm or clip", fix="leave them out"
            )
        return self

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns attention of the same kind with small heads, for a smoke run of
        sequences of ``seq_len``: the ratio of query to kv heads stays, up to 8, and
        windows are a quarter of a sequence."""
        group_size = min(self.num_heads // self.num_kv_heads, 8)
        # Multi-query stays multi-query; two heads stand for any other number.
        num_kv_heads = 1 if self.num_kv_heads == 1 else 2
        window = None if self.window is None else max(2, seq_len // 4)
        latent = self.latent
        if latent is not None:
            latent = latent.model_copy(
                update={
                    "q_rank": None if latent.q_rank is None else head_dim,
                    "kv_rank": head_dim,
                    "rotary_dim": head_dim // 2,
                    "value_dim": head_dim,
                }
            )
        return self.model_copy(
            update={
                "num_heads": group_size * num_kv_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "window": window,
                "latent": latent,
            }
        )

    @property
    def value_dim(self) -> int:
        """Size of a value head."""
        return self.latent.value_dim if self.latent else self.head_dim


class KeysValues(NamedTuple):
    """Keys [B, T, K, H] and values [B, T, K, Hv] of one layer."""

    key: jax.Array
    value: jax.Array


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
    """Angles of the positions; None: queries and keys are not turned."""
    slopes: jax.Array | None
    """fp32 [N], of ALiBi: slope · distance is taken from a score."""
    biases: jax.Array | None
    """fp32 [N, 2R + 1], learnt, for key − query from −R to R; added to scores."""
    scale: float
    """Factor on q·k."""
    window: int | None
    """Tokens that a token sees, itself included; None: all before it."""
    causal: bool
    batch: RaggedBatch | None = None
    """With a cache: the sequences that the tokens continue."""


class Attention(nnx.Module):
    """Attention (Vaswani et al. 2017, §3.2.2) with grouped kv heads (Ainslie et al.
    2023)."""

    name = "attention"
    """The attribute of a :class:`~maxlm.models.blocks.Block` that it is stored as."""
    joint_projections = (("query", "key", "value"),)
    """Maps of the same input that are always applied together, in this order: inference
    may store their kernels as one (``inference/params.py``)."""

    def __init__(
        self, config: AttentionConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.rules = context.rules
        self.parallel = context.parallel
        residual = {"embed": context.d_model}
        query_heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        key_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.query = Linear(residual, query_heads, context, bias=config.bias)
        self.key = Linear(residual, key_heads, context, bias=config.bias)
        self.value = Linear(residual, key_heads, context, bias=config.bias)
        self.query_norm = (
            Norm(norm, config.head_dim, context) if config.qk_norm else None
        )
        self.key_norm = Norm(norm, config.head_dim, context) if config.qk_norm else None
        self.sinks = declare_sinks(config)
        self.out = Linear(
            query_heads,
            residual,
            context,
            bias=config.has_out_bias,
            std=context.residual_std,
        )

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: AttentionCache | None = None,
    ) -> tuple[jax.Array, AttentionCache | None]:
        """Self-attention of x [B, S, D]; see :class:`~maxlm.models.blocks.Mixer`.

        Tokens of a sequence that is split over devices may stand in another order, that
        of ``maxlm.parallel.context.sequence_order_indices``: ``inputs.positions`` has
        each token's place, and attention's masks take the order into account.
        """
        # [B, S, N, H], and twice [B, S, K, H].
        q, k, v = self._clip(*project(x, self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q = self.query_norm(q)
            k = self.key_norm(k)
        if inputs.rotary is not None:
            q = rotate(q, inputs.rotary)
            k = rotate(k, inputs.rotary)
        # A prefix adapter sets the keys and values of its virtual tokens; after the
        # rotation, since its keys have no positions.
        k = replace_virtual(self.key.kernel, k, inputs.positions, self.rules)
        v = replace_virtual(self.value.kernel, v, inputs.positions, self.rules)
        # A name that remat policies keep (models/remat.py).
        q = checkpoint_name(q, "qkv")
        k = checkpoint_name(k, "qkv")
        v = checkpoint_name(v, "qkv")
        y, cache = attend(self, q, k, v, inputs, cache, self.rules)
        return self.out(y, seq_axis="residual"), cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> AttentionCache:
        """A layer's cache; see :mod:`maxlm.models.caches`."""
        head_dim = self.config.head_dim
        return kv_cache_spec(
            layout, window, self.config.num_kv_heads, head_dim, head_dim
        )

    def costs(self, kv_input: FeatureKind = "residual") -> LayerCosts:
        """Counts costs of one layer whose keys and values are made of ``kv_input``; see
        :mod:`maxlm.models.costs`."""
        config = self.config
        query = ("query.kernel",)
        keys_values = ("key.kernel", "value.kernel")
        # Products that the backward pass needs as they were before a clip (of all
        # three) or a norm (of queries and keys): saving "qkv" does not save these.
        changed_after: tuple[str, ...] = ()
        if config.clip is not None:
            changed_after = (*query, *keys_values)
        elif config.qk_norm:
            changed_after = ("query.kernel", "key.kernel")
        if kv_input == "residual":
            inner = (
                MatrixGroup((*query, *keys_values), needs_raw_output=changed_after),
            )
        else:
            inner = (
                MatrixGroup(query, needs_raw_output=changed_after),
                MatrixGroup(keys_values, kv_input, changed_after),
            )
        out = MatrixGroup(("out.kernel",), "heads")
        heads = AttentionCosts(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.value_dim,
            qk_norm=config.qk_norm,
        )
        return LayerCosts((*inner, out), heads)

    def project_keys_values(self, encoder_states: jax.Array) -> KeysValues:
        """Projects an encoder's output [B, T, D] to keys and values for
        :meth:`cross_attend`."""
        k, v = self._clip(*project(encoder_states, self.key, self.value))
        if self.key_norm is not None:
            k = self.key_norm(k)
        return KeysValues(checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv"))

    def cross_attend(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        encoded: EncoderOutput | CrossCache,
    ) -> jax.Array:
        """Applies cross-attention to x [B, S, D]: every token sees all of an encoder's
        in its segment, without positions. ``encoded`` is a ``CrossCache`` with a batch
        of sequences, else an :class:`EncoderOutput`."""
        # The config's scale, not that of ``inputs``, which may be adjusted for the
        # positions of a kind of layer (``TransformerConfig.score_scale``).
        (q,) = self._clip(self.query(x))
        if self.query_norm is not None:
            q = self.query_norm(q)
        q = checkpoint_name(q, "qkv")
        terms = AttentionTerms(
            scale=self.config.scale,
            soft_cap=self.config.soft_cap,
            sinks=read_sinks(self),
        )
        if isinstance(encoded, CrossCache):
            assert inputs.batch is not None
            # No new keys and values: the cache has the encoder's.
            y, _ = encoded.attend(q, None, None, inputs.batch, terms, rules=self.rules)
            return self.out(y, seq_axis="residual")

        k, v = self.project_keys_values(encoded.states)
        segment_ids = None
        if encoded.segment_ids is not None:
            q_segments = inputs.segment_ids
            if q_segments is None:  # all in segment 1
                q_segments = jnp.ones_like(inputs.positions)
            segment_ids = (q_segments, encoded.segment_ids)
        y = sharded_attention(
            q, k, v, terms, rules=self.rules, causal=False, segment_ids=segment_ids
        )
        return self.out(y, seq_axis="residual")

    def _clip(self, *heads: jax.Array) -> tuple[jax.Array, ...]:
        clip = self.config.clip
        if clip is None:
            return heads
        return tuple(jnp.clip(head, -clip, clip) for head in heads)


class LatentAttention(nnx.Module):
    """Keys and values of every head from one vector a token (DeepSeek-V2, arXiv
    2405.04434, eq. 9–19).

    Parameters, with latent vectors of C = kv_rank and heads whose last P dimensions are
    rotary:

    - ``query`` [D, N, H]; with a q_rank [q_rank, N, H], behind ``query_down`` [D,
      q_rank] and ``query_norm``;
    - ``key_down`` [D, C] and ``key_norm``, which make the latent vector;
    - ``key_up`` [C, N, H − P] and ``value_up`` [C, N, Hv], which read it;
    - ``key_rotary`` [D, P], the rotary part of the key, shared by all heads;
    - ``out`` [N, Hv, D].
    """

    name = "attention"

    def __init__(
        self, config: AttentionConfig, norm: NormConfig, context: BuildContext
    ):
        assert config.latent is not None
        latent = config.latent
        rules = context.rules
        self.config = config
        self.latent = latent
        self.parallel = context.parallel
        # Every query head has its own keys and values, on the query head's device.
        self.rules = rules.model_copy(update={"kv_heads": rules.heads})
        # The latent vector is whole on every device that has heads.
        self.shared_rules = rules.model_copy(update={"kv_heads": ()})

        residual = {"embed": context.d_model}
        query_heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        # Head dimensions without positions; the rotary ones are shared by all heads.
        plain_heads = {"heads": config.num_heads, "head_dim": self._plain_dim}
        value_heads = {"heads": config.num_heads, "head_dim": latent.value_dim}
        # The input axis of maps that read a latent vector has the name of the residual
        # stream's: its kernels are stored split over the same mesh axes.
        vector = {"embed": latent.kv_rank}
        q_rank = latent.q_rank
        query_down = None
        query_norm = None
        query_input = residual
        if q_rank is not None:
            query_down = Linear(residual, {"latent": q_rank}, context, bias=config.bias)
            query_norm = Norm(norm, q_rank, context)
            query_input = {"embed": q_rank}
        self.query_down = query_down
        self.query_norm = query_norm
        self.query = Linear(query_input, query_heads, context, bias=False)
        self.key_down = Linear(
            residual, {"latent": latent.kv_rank}, context, bias=config.bias
        )
        self.key_norm = Norm(norm, latent.kv_rank, context)
        self.key_rotary = Linear(
            residual, {"head_dim": latent.rotary_dim}, context, bias=config.bias
        )
        self.key_up = Linear(vector, plain_heads, context, bias=False)
        self.value_up = Linear(vector, value_heads, context, bias=False)
        self.sinks = declare_sinks(config)
        self.out = Linear(
            value_heads,
            residual,
            context,
            bias=config.has_out_bias,
            std=context.residual_std,
        )

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: AttentionCache | None = None,
    ) -> tuple[jax.Array, AttentionCache | None]:
        """See :class:`Attention`."""
        assert inputs.rotary is not None
        # The first map of queries: to heads, or with a q_rank to a narrow vector.
        first_query_map = self.query if self.query_down is None else self.query_down
        query_or_latent, vector, shared_key = project(
            x, first_query_map, self.key_down, self.key_rotary
        )
        q = query_or_latent
        if self.query_norm is not None:
            q = self.query(self.query_norm(query_or_latent))
        q_plain = q[..., : self._plain_dim]  # [B, S, N, H − P]
        q_rotary = rotate(q[..., self._plain_dim :], inputs.rotary)  # [B, S, N, P]
        vector = self.key_norm(vector)  # [B, S, C]
        # One rotary key for all heads: [B, S, 1, P].
        shared_key = rotate(shared_key[:, :, None], inputs.rotary)
        if cache is None:
            y, cache = self._attend_by_heads(
                q_plain, q_rotary, vector, shared_key, inputs
            )
        else:
            y, cache = self._attend_by_vectors(
                q_plain, q_rotary, vector, shared_key, inputs, cache
            )
        return self.out(y, seq_axis="residual"), cache

    @property
    def _plain_dim(self) -> int:
        """Dimensions of a query or key head without positions, H − P."""
        return self.config.head_dim - self.latent.rotary_dim

    def _attend_by_heads(
        self,
        q_plain: jax.Array,
        q_rotary: jax.Array,
        vector: jax.Array,
        shared_key: jax.Array,
        inputs: AttentionInputs,
    ) -> tuple[jax.Array, None]:
        """Makes every head's keys and values of the vectors, and attends to them, as
        training does: a score takes H + Hv multiplications, not 2·C + P."""
        # [B, S, N, H − P] and [B, S, N, Hv].
        k_plain, v = project(vector, self.key_up, self.value_up)
        k_rotary_shape = (*k_plain.shape[:3], shared_key.shape[-1])
        k_rotary = jnp.broadcast_to(
            shared_key, k_rotary_shape, out_sharding=jax.typeof(k_plain).sharding
        )
        k = jnp.concatenate([k_plain, k_rotary], axis=-1)
        q = jnp.concatenate([q_plain, q_rotary], axis=-1)
        q = checkpoint_name(q, "qkv")
        k = checkpoint_name(k, "qkv")
        v = checkpoint_name(v, "qkv")
        y, _ = attend(self, q, k, v, inputs, None, self.rules)
        return y, None

    def _attend_by_vectors(
        self,
        q_plain: jax.Array,
        q_rotary: jax.Array,
        vector: jax.Array,
        shared_key: jax.Array,
        inputs: AttentionInputs,
        cache: AttentionCache,
    ) -> tuple[jax.Array, AttentionCache | None]:
        """Attends to a cache of vectors without making keys and values: q·(U c) =
        (Uᵀ q)·c, and Σ w (V c) = V Σ w c (§2.1.2), so that a token reads C + P numbers
        of each earlier one."""
        q_vector = self._apply_kernel(q_plain, self.key_up, "bsnh,cnh->bsnc")
        q = jnp.concatenate([q_vector, q_rotary], axis=-1)  # [B, S, N, C + P]
        k = jnp.concatenate([vector[:, :, None], shared_key], axis=-1)  # one kv head
        y, new_cache = attend(
            self,
            q,
            k,
            None,
            inputs,
            cache,
            self.shared_rules,
            value_dim=self.latent.kv_rank,
        )
        return self._apply_kernel(y, self.value_up, "bsnc,cnh->bsnh"), new_cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> AttentionCache:
        """A layer's cache of vectors with the shared rotary keys behind them;
        attention's values are the vectors."""
        return kv_cache_spec(
            layout,
            window,
            num_kv_heads=1,
            key_size=self.latent.kv_rank + self.latent.rotary_dim,
            value_size=None,
        )

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        has_query_down = self.query_down is not None
        first_query_map = "query_down.kernel" if has_query_down else "query.kernel"
        groups = [
            MatrixGroup((first_query_map, "key_down.kernel", "key_rotary.kernel")),
            MatrixGroup(("key_up.kernel", "value_up.kernel"), "latent"),
            MatrixGroup(("out.kernel",), "heads"),
        ]
        if has_query_down:
            groups.append(MatrixGroup(("query.kernel",), "latent"))
        heads = AttentionCosts(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.value_dim,
            kv_axis="heads",
            shared_key_dim=self.latent.rotary_dim,
        )
        return LayerCosts(tuple(groups), heads)

    def _apply_kernel(self, x: jax.Array, linear: Linear, equation: str) -> jax.Array:
        """Multiplies heads x [B, S, N, ...] by a map's kernel along other dimensions
        than the map does."""
        kernel = materialize(linear.kernel, self.rules, linear.dtype)
        out_sharding = self.rules.spec("batch", "seq", "heads", None)
        return jnp.einsum(equation, x, kernel, out_sharding=out_sharding)


def declare_sinks(config: AttentionConfig) -> nnx.Param | None:
    """Declares a layer's sinks [N], where it has any."""
    if not config.sinks:
        return None
    zeros = jax.nn.initializers.zeros
    return declare((config.num_heads,), ("heads",), zeros, "vector")


def read_sinks(layer: Attention | LatentAttention) -> jax.Array | None:
    """Returns a layer's sinks [N] in fp32 or wider, split as heads are; None: it has
    none."""
    if layer.sinks is None:
        return None
    return materialize(layer.sinks, layer.rules, accumulation_dtype(layer.out.dtype))


def attend(
    layer: Attention | LatentAttention,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    inputs: AttentionInputs,
    cache: AttentionCache | None,
    rules: AxisRules,
    *,
    value_dim: int | None = None,
) -> tuple[jax.Array, AttentionCache | None]:
    """Attends to these tokens and a cache's, if there is one.

    Args:
        q: [B, S, N, H].
        k, v: [B, S, K, H] and [B, S, K, Hv]; no value, with a cache: it is the
            beginning of the key.
        rules: layout of q, k and v, where their kv heads need not lie as the layer's
            own rules say: the one kv head of a cache of latent vectors is not split.
        value_dim: Hv, where there is no value.

    Returns:
        [B, S, N, Hv], and the cache with these tokens in it.
    """
    terms = AttentionTerms(
        window=inputs.window,
        scale=inputs.scale,
        soft_cap=layer.config.soft_cap,
        slopes=inputs.slopes,
        biases=inputs.biases,
        sinks=read_sinks(layer),
    )
    if cache is not None:
        assert inputs.batch is not None
        return cache.attend(
            q, k, v, inputs.batch, terms, rules=rules, value_dim=value_dim
        )
    assert v is not None
    segments = inputs.segment_ids
    y = sharded_attention(
        q,
        k,
        v,
        terms,
        rules=rules,
        causal=inputs.causal,
        segment_ids=None if segments is None else (segments, segments),
        method=layer.parallel.context,
        balanced=layer.parallel.balance_sequence,
    )
    return y, None
