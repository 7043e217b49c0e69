"""Latent attention: keys and values of all heads come from one narrow vector a token.

Shapes: B batch, S sequence, D model, N query heads, H head dim, Hv value dim, C latent
dims (``kv_rank``), P rotary dims.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.costs import AttentionCosts, LayerCosts, MatrixGroup
from maxlm.models.layers.attend import (
    AttentionInputs,
    apply_output_gate,
    attend,
    build_output_gate,
    declare_sinks,
    scale_by_position,
)
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import materialize
from maxlm.parallel.terms import limit_window


class LatentProjections(NamedTuple):
    """What latent attention makes of a layer's input."""

    q_plain: jax.Array
    """[B, S, N, H − P]: queries' dimensions without positions."""
    q_rotary: jax.Array
    """[B, S, N, P]: those that RoPE has turned."""
    vector: jax.Array
    """[B, S, C]: what keys and values of all heads come from."""
    shared_key: jax.Array
    """[B, S, 1, P]: the rotary part of the key, one for all heads."""
    gate: jax.Array | None
    query_vector: jax.Array | None
    """[B, S, q_rank], normalised: what queries come from; None without a q_rank."""


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
    - ``gate`` [D, N, Hv] or [D, N], where ``output_gate`` says so;
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

        if latent.norm_eps is not None:
            norm = norm.model_copy(update={"eps": latent.norm_eps})
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
        self.gate = build_output_gate(config, context)
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
        cache: LayerCache | None = None,
    ) -> MixerOutput:
        """See :class:`~maxlm.models.layers.attention.Attention`. Without
        ``inputs.rotary`` the rotary dimensions are like the others, but for the key that
        all heads share (Kimi Linear)."""
        projections = self.project_input(x, inputs)
        if cache is None:
            q, k, v = self.make_heads(projections)
            y, _ = attend(self, q, k, v, inputs, None, self.rules)
        else:
            q, k = self.make_vectors(projections)
            y, cache = attend(
                self,
                q,
                k,
                None,
                inputs,
                cache,
                self.shared_rules,
                value_dim=self.latent.kv_rank,
            )
            y = self.make_head_outputs(y)
        return MixerOutput(self.finish(y, projections.gate), cache)

    def project_input(
        self, x: jax.Array, inputs: AttentionInputs
    ) -> "LatentProjections":
        """Maps x [B, S, D] to queries and to the vectors of keys and values."""
        # The first map of queries: to heads, or with a q_rank to a narrow vector.
        first_query_map = self.query if self.query_down is None else self.query_down
        maps = [first_query_map, self.key_down, self.key_rotary]
        if self.gate is not None:
            maps.append(self.gate)
        query_or_vector, vector, shared_key, *gates = project(x, *maps)
        query_vector = None
        q = query_or_vector
        if self.query_norm is not None:
            query_vector = self.query_norm(query_or_vector)
            q = self.query(query_vector)
        q = scale_by_position(q, inputs.positions, self.config.temperature)
        return LatentProjections(
            q_plain=q[..., : self._plain_dim],
            q_rotary=_turn(q[..., self._plain_dim :], inputs.rotary),
            vector=self.key_norm(vector),
            shared_key=_turn(shared_key[:, :, None], inputs.rotary),
            gate=checkpoint_name(gates[0], "qkv") if gates else None,
            query_vector=query_vector,
        )

    @property
    def _plain_dim(self) -> int:
        """Dimensions of a query or key head without positions, H − P."""
        return self.config.head_dim - self.latent.rotary_dim

    def make_heads(
        self, projections: "LatentProjections"
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Makes queries and keys [B, S, N, H] and values [B, S, N, Hv] of every head, as
        training attends to them: a score takes H + Hv multiplications, not 2·C + P."""
        # [B, S, N, H − P] and [B, S, N, Hv].
        k_plain, v = project(projections.vector, self.key_up, self.value_up)
        shared_key = projections.shared_key
        k_rotary_shape = (*k_plain.shape[:3], shared_key.shape[-1])
        k_rotary = jnp.broadcast_to(
            shared_key, k_rotary_shape, out_sharding=jax.typeof(k_plain).sharding
        )
        k = jnp.concatenate([k_plain, k_rotary], axis=-1)
        q = jnp.concatenate([projections.q_plain, projections.q_rotary], axis=-1)
        return (
            checkpoint_name(q, "qkv"),
            checkpoint_name(k, "qkv"),
            checkpoint_name(v, "qkv"),
        )

    def make_vectors(
        self, projections: "LatentProjections"
    ) -> tuple[jax.Array, jax.Array]:
        """Makes queries [B, S, N, C + P] of the vectors, and the vectors with their
        rotary part [B, S, 1, C + P], without keys and values of heads: q·(U c) =
        (Uᵀ q)·c, and Σ w (V c) = V Σ w c (§2.1.2), so that a token reads C + P numbers
        of each earlier one."""
        q_vector = self._apply_kernel(
            projections.q_plain, self.key_up, "bsnh,cnh->bsnc"
        )
        q = jnp.concatenate([q_vector, projections.q_rotary], axis=-1)
        vector = projections.vector[:, :, None]  # one kv head
        return q, jnp.concatenate([vector, projections.shared_key], axis=-1)

    def make_head_outputs(self, y: jax.Array) -> jax.Array:
        """Maps weighted vectors [B, S, N, C] to outputs of heads [B, S, N, Hv]."""
        return self._apply_kernel(y, self.value_up, "bsnc,cnh->bsnh")

    def finish(self, y: jax.Array, gate: jax.Array | None) -> jax.Array:
        """Maps outputs of heads [B, S, N, Hv], behind their gate, to [B, S, D]."""
        return self.out(apply_output_gate(y, gate), seq_axis="residual")

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """A layer's cache of vectors with the shared rotary keys behind them;
        attention's values are the vectors."""
        return kv_cache_spec(
            layout,
            limit_window(window, self.config.chunk),
            num_kv_heads=1,
            key_size=self.latent.kv_rank + self.latent.rotary_dim,
            value_size=None,
            chunk=self.config.chunk,
        )

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        has_query_down = self.query_down is not None
        first_query_map = "query_down.kernel" if has_query_down else "query.kernel"
        of_residual = [first_query_map, "key_down.kernel", "key_rotary.kernel"]
        if self.gate is not None:
            of_residual.append("gate.kernel")
        groups = [
            MatrixGroup(tuple(of_residual)),
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
            chunk=config.chunk,
            gate_dim=config.gate_dim,
        )
        return LayerCosts(tuple(groups), heads)

    def _apply_kernel(self, x: jax.Array, linear: Linear, equation: str) -> jax.Array:
        """Multiplies heads x [B, S, N, ...] by a map's kernel along other dimensions
        than the map does."""
        kernel = materialize(linear.kernel, self.rules, linear.dtype)
        out_sharding = self.rules.spec("batch", "seq", "heads", None)
        return jnp.einsum(equation, x, kernel, out_sharding=out_sharding)


def _turn(x: jax.Array, rotary: Rotary | None) -> jax.Array:
    """Turns x [B, S, N, P] by its positions; None: returns it."""
    return x if rotary is None else rotate(x, rotary)
