"""Normalisation of attention's heads, in fp32.

Shapes: B batch, S sequence, N heads of queries, keys or values, H head dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.build_context import BuildContext
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only


class HeadNorm(nnx.Module):
    """RMSNorm or LayerNorm of heads, with weights [N, H] or none.

    Over all heads the mean of squares is a sum over the devices that heads are split
    over.

    Args:
        config: gives the kind, eps and centring of weights; offsets are ``bias``.
        heads_axis: logical axis of the heads; None: there are no weights.
        over_all_heads: whether all N·H numbers of a token have one mean, not the H of
            each head.
    """

    def __init__(
        self,
        config: NormConfig,
        context: BuildContext,
        heads_axis: Literal["heads", "kv_heads"] | None = None,
        shape: tuple[int, int] = (0, 0),
        *,
        over_all_heads: bool = False,
    ):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.over_all_heads = over_all_heads
        scale = None
        bias = None
        zeros = jax.nn.initializers.zeros
        if heads_axis is not None:
            axes = (heads_axis, "head_dim")
            ones = jax.nn.initializers.ones
            initial_scale = zeros if config.zero_centred else ones
            scale = declare(shape, axes, initial_scale, "vector")
            if config.bias:
                bias = declare(shape, axes, zeros, "vector")
        self.scale = scale
        self.bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, N, H] → the same shape in the compute dtype."""
        wide = accumulation_dtype(self.dtype)
        scale = None
        bias = None
        if self.scale is not None:
            scale = materialize(self.scale, self.rules, wide)
        if self.bias is not None:
            bias = materialize(self.bias, self.rules, wide)
        return save_inputs_only(self._normalise)(x, scale, bias)

    def _normalise(
        self, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        axes = (-2, -1) if self.over_all_heads else (-1,)
        x = x.astype(accumulation_dtype(self.dtype))
        if self.config.kind == "layernorm":
            x -= jnp.mean(x, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
        y = x * jax.lax.rsqrt(variance + self.config.eps)
        if scale is not None:
            y *= 1 + scale if self.config.zero_centred else scale
        if bias is not None:
            y += bias
        return y.astype(self.dtype)


def build_qk_norms(
    config: AttentionConfig, norm: NormConfig, context: BuildContext
) -> tuple[Norm | HeadNorm | None, Norm | HeadNorm | None]:
    """Builds the norms of a layer's queries and keys, as ``config.qk_norm_form`` says;
    None: it has none."""
    if not config.qk_norm:
        return None, None
    form = config.qk_norm_form
    if form == "head":
        head_dim = config.head_dim
        query_norm = Norm(norm, head_dim, context)
        return query_norm, None if config.shares_keys else Norm(norm, head_dim, context)

    def build(heads_axis: Literal["heads", "kv_heads"], num_heads: int) -> HeadNorm:
        if form == "weightless":
            return HeadNorm(norm, context)
        return HeadNorm(
            norm,
            context,
            heads_axis,
            (num_heads, config.head_dim),
            over_all_heads=form == "all_heads",
        )

    query_norm = build("heads", config.num_heads)
    if config.shares_keys:
        return query_norm, None
    return query_norm, build("kv_heads", config.num_kv_heads)
