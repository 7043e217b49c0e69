"""Multi-head attention: multi-query, grouped and full, with an optional key-value cache.
Latent attention is in ``latent.py``.

Shapes: B batch, S queries, T keys, D model, N query heads, K kv heads, H head dim, Hv
value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.paged import AttentionCache, CrossCache
from maxlm.models.costs import AttentionCosts, FeatureKind, LayerCosts, MatrixGroup
from maxlm.models.layers.attend import (
    AttentionInputs,
    EncoderOutput,
    KeysValues,
    ProjectionTerms,
    apply_output_gate,
    attend,
    build_output_gate,
    declare_sinks,
    read_sinks,
    scale_by_position,
)
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.head_norm import HeadNorm, build_qk_norms
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import replace_virtual
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.terms import AttentionTerms, limit_window


class Attention(nnx.Module):
    """Attention (Vaswani et al. 2017, §3.2.2) with grouped kv heads (Ainslie et al.
    2023).

    Args:
        input_dim: width of the input; None: d_model, that of the output.
    """

    name = "attention"
    """The attribute of a :class:`~maxlm.models.blocks.Block` that it is stored as."""

    def __init__(
        self,
        config: AttentionConfig,
        norm: NormConfig,
        context: BuildContext,
        *,
        input_dim: int | None = None,
    ):
        self.config = config
        self.rules = context.rules
        self.parallel = context.parallel
        input_features = {"embed": input_dim or context.d_model}
        residual = {"embed": context.d_model}
        query_heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        key_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        value_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.value_dim}
        outputs = {"heads": config.num_heads, "head_dim": config.value_dim}
        self.query = Linear(input_features, query_heads, context, bias=config.bias)
        key = None
        value = None
        if not config.shares_keys:
            key = Linear(input_features, key_heads, context, bias=config.bias)
            if not config.keys_as_values:
                value = Linear(input_features, value_heads, context, bias=config.bias)
        self.key = key
        self.value = value
        self.gate = build_output_gate(config, context, input_dim)
        self.query_norm, self.key_norm = build_qk_norms(config, norm, context)
        has_value_norm = config.value_norm and not config.shares_keys
        self.value_norm = HeadNorm(norm, context) if has_value_norm else None
        self.sinks = declare_sinks(config)
        self.out = Linear(
            outputs,
            residual,
            context,
            bias=config.has_out_bias,
            std=context.residual_std,
        )

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """Maps of the same input that are always applied together, in this order:
        inference may store their kernels as one (``inference/params.py``)."""
        names = ("query", "key", "value", "gate")
        joint = tuple(name for name in names if getattr(self, name) is not None)
        return (joint,) if len(joint) > 1 else ()

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: AttentionCache | None = None,
        terms: ProjectionTerms = ProjectionTerms(),
    ) -> MixerOutput:
        """Self-attention of x [B, S, D]; see :class:`~maxlm.models.blocks.Mixer`.
        ``terms``: of a layer that has maps of its own beside these.

        Tokens of a sequence that is split over devices may stand in another order, that
        of ``maxlm.parallel.context.sequence_order_indices``: ``inputs.positions`` has
        each token's place, and attention's masks take the order into account.

        A layer whose config has ``shares_keys`` reads an earlier layer's keys and
        values: without a cache ``inputs.shared``, with one the earlier layer's cache,
        which has these tokens already.

        Returns:
            [B, S, D]; and the cache with these tokens in it, or without a cache the
            keys and values that the layer has attended to.
        """
        q, shared_or_new, gate = self._project(x, inputs, terms)
        # A name that remat policies keep (models/remat.py).
        q = checkpoint_name(q, "qkv")
        if gate is not None:
            gate = checkpoint_name(gate, "qkv")
        if self.config.shares_keys and cache is not None:
            y, new_cache = attend(self, q, None, None, inputs, cache, self.rules)
        else:
            assert shared_or_new is not None
            k, v = shared_or_new
            y, new_cache = attend(self, q, k, v, inputs, cache, self.rules)
        y = self.out(apply_output_gate(y, gate), seq_axis="residual")
        if cache is None:
            return MixerOutput(y, keys_values=shared_or_new)
        return MixerOutput(y, new_cache)

    def _project(
        self, x: jax.Array, inputs: AttentionInputs, terms: ProjectionTerms
    ) -> tuple[jax.Array, KeysValues | None, jax.Array | None]:
        """Maps x [B, S, D] to queries [B, S, N, H], to keys and values, and to the gate;
        queries and keys are normalised and turned. Without maps to keys:
        ``inputs.shared``."""

        def add_term(product: jax.Array, term: jax.Array | None) -> jax.Array:
            return product if term is None else product + term

        maps = (self.query, self.key, self.value, self.gate)
        products = iter(project(x, *(linear for linear in maps if linear is not None)))
        (q,) = self._clip(add_term(next(products), terms.query))
        keys_values = inputs.shared
        if self.key is not None:
            (k,) = self._clip(add_term(next(products), terms.key))
            v = k
            if self.value is not None:
                (v,) = self._clip(add_term(next(products), terms.value))
            k = self._place(k, self.key_norm, inputs.rotary)
            if self.value_norm is not None:
                v = self.value_norm(v)
            # A prefix adapter sets the keys and values of its virtual tokens; after the
            # rotation, since its keys have no positions.
            value_kernel = (self.value or self.key).kernel
            k = replace_virtual(self.key.kernel, k, inputs.positions, self.rules)
            v = replace_virtual(value_kernel, v, inputs.positions, self.rules)
            k = checkpoint_name(k, "qkv")
            v = checkpoint_name(v, "qkv")
            keys_values = KeysValues(k, v)
        q = self._place(q, self.query_norm, inputs.rotary)
        q = scale_by_position(q, inputs.positions, self.config.temperature)
        return q, keys_values, next(products, None)

    def _place(
        self, x: jax.Array, norm: Norm | HeadNorm | None, rotary: Rotary | None
    ) -> jax.Array:
        """Normalises queries or keys [B, S, N, H], and turns them by their
        positions."""
        norm_comes_last = self.config.qk_norm_after_rope
        if norm is not None and not norm_comes_last:
            x = norm(x)
        if rotary is not None:
            x = rotate(x, rotary)
        if norm is not None and norm_comes_last:
            x = norm(x)
        return x

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """A layer's cache; see :mod:`maxlm.models.caches`. One that shares another's
        keys has none. Raises MaxlmError: a kind of cache that cannot be shared, or does
        not know chunks."""
        config = self.config
        return kv_cache_spec(
            layout,
            limit_window(window, config.chunk),
            config.num_kv_heads,
            config.head_dim,
            config.value_dim,
            chunk=config.chunk,
            is_shared=config.shares_keys,
        )

    def costs(self, kv_input: FeatureKind = "residual") -> LayerCosts:
        """Counts costs of one layer whose keys and values are made of ``kv_input``; see
        :mod:`maxlm.models.costs`."""
        config = self.config
        query = ["query.kernel"]
        if self.gate is not None:
            query.append("gate.kernel")
        keys_values = []
        if self.key is not None:
            keys_values.append("key.kernel")
        if self.value is not None:
            keys_values.append("value.kernel")
        # Products that the backward pass needs as they were before a clip (of all
        # three) or a norm: saving "qkv" does not save these.
        changed_after: list[str] = []
        if config.clip is not None:
            changed_after = ["query.kernel", *keys_values]
        elif config.qk_norm:
            changed_after = ["query.kernel", *keys_values[:1]]
        if config.value_norm and "value.kernel" not in changed_after:
            changed_after.extend(keys_values[1:])
        needs_raw = tuple(changed_after)
        if kv_input == "residual":
            inner = (MatrixGroup((*query, *keys_values), needs_raw_output=needs_raw),)
        else:
            inner = (
                MatrixGroup(tuple(query), needs_raw_output=needs_raw),
                MatrixGroup(tuple(keys_values), kv_input, needs_raw),
            )
        out = MatrixGroup(("out.kernel",), "heads")
        heads = AttentionCosts(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.value_dim,
            qk_norm=config.qk_norm,
            chunk=config.chunk,
            gate_dim=config.gate_dim,
            makes_keys=self.key is not None,
        )
        return LayerCosts((*inner, out), heads)

    def project_keys_values(self, encoder_states: jax.Array) -> KeysValues:
        """Projects an encoder's output [B, T, D] to keys and values for
        :meth:`cross_attend`."""
        if self.key is None:
            raise ValueError("shares_keys: cross-attention has keys of its own")
        if self.value is None:
            (k,) = self._clip(self.key(encoder_states))
            v = k
        else:
            k, v = self._clip(*project(encoder_states, self.key, self.value))
        k = self._place(k, self.key_norm, None)
        if self.value_norm is not None:
            v = self.value_norm(v)
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
        maps = (self.query,) if self.gate is None else (self.query, self.gate)
        product, *gates = project(x, *maps)
        gate = gates[0] if gates else None
        (q,) = self._clip(product)
        q = self._place(q, self.query_norm, None)
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
            return self.out(apply_output_gate(y, gate), seq_axis="residual")

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
        return self.out(apply_output_gate(y, gate), seq_axis="residual")

    def _clip(self, *heads: jax.Array) -> tuple[jax.Array, ...]:
        clip = self.config.clip
        if clip is None:
            return heads
        return tuple(jnp.clip(head, -clip, clip) for head in heads)
