"""Normalisation over the last axis, in fp32."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from maxlm.config import Config
from maxlm.models.params import compute_view, declare
from maxlm.models.remat import recomputed
from maxlm.sharding import AxisRules


class NormConfig(Config):
    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """rmsnorm divides by the root mean square; layernorm also removes the mean (slower)."""
    eps: float = Field(default=1e-5, gt=0)
    bias: bool = False
    """Add a learned offset (GPT-2's LayerNorm does)."""


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4)."""

    def __init__(self, config: NormConfig, size: int, *, rules: AxisRules, dtype: Any):
        self.config, self.rules, self.dtype = config, rules, dtype
        # The scale is whole on every device: a few kilobytes that every residual element needs.
        self.scale = declare((size,), (None,), jax.nn.initializers.ones, "vector")
        self.bias = (
            declare((size,), (None,), jax.nn.initializers.zeros, "vector") if config.bias else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] → the same shape in the compute dtype."""
        scale = compute_view(self.scale, self.rules, jnp.float32)
        bias = compute_view(self.bias, self.rules, jnp.float32) if self.bias is not None else None
        return recomputed(self._normalise)(x, scale, bias)

    def _normalise(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.config.kind == "layernorm":
            x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(variance + self.config.eps)
        y *= scale
        if bias is not None:
            y += bias
        return y.astype(self.dtype)
