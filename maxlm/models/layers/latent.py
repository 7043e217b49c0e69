"""Latent attention: keys and values of all heads come from one narrow vector a token.

Shapes: B batch, S sequence, D model, N query heads, H head dim, Hv value dim, C latent
dims (``kv_rank``), P rotary dims.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.paged import AttentionCache
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
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, rotate
from maxlm.models.params import materialize
from maxlm.parallel.terms import limit_window


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
        cache: AttentionCache | None = None,
    ) -> tuple[jax.Array, AttentionCache | None]:
        """See :class:`~maxlm.models.layers.attention.Attention`. Without
        ``inputs.rotary`` the rotary dimensions are like the others, but for the key that
        all heads share (Kimi Linear)."""
        # The first map of queries: to heads, or with a q_rank to a narrow vector.
        first_query_map = self.query if self.query_down is None else self.query_down
        maps = [first_query_map, self.key_down, self.key_rotary]
        if self.gate is not None:
            maps.append(self.gate)
        query_or_latent, vector, shared_key, *gates = project(x, *maps)
        gate = checkpoint_name(gates[0], "qkv") if gates else None
        q = query_or_latent
        if self.query_norm is not None:
            q = self.query(self.query_norm(query_or_latent))
        q = scale_by_position(q, inputs.positions, self.config.temperature)
        q_plain = q[..., : self._plain_dim]  # [B, S, N, H − P]
        q_rotary = _turn(q[..., self._plain_dim :], inputs.rotary)  # [B, S, N, P]
        vector = self.key_norm(vector)  # [B, S, C]
        # One rotary key for all heads: [B, S, 1, P].
        shared_key = _turn(shared_key[:, :, None], inputs.rotary)
        if cache is None:
            y, cache = self._attend_by_heads(
                q_plain, q_rotary, vector, shared_key, inputs
            )
        else:
            y, cache = self._attend_by_vectors(
                q_plain, q_rotary, vector, shared_key, inputs, cache
            )
        return self.out(apply_output_gate(y, gate), seq_axis="residual"), cache

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
