"""Normalisation over the last axis, in fp32."""

from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only


class NormConfig(Config):
    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """rmsnorm divides by the root mean square; layernorm also removes the mean
    (slower)."""
    eps: float = Field(default=1e-5, gt=0)
    bias: bool = False
    """Add a learned offset (GPT-2's LayerNorm does)."""
    zero_centred: bool = False
    """Multiply by 1 + scale, with a scale that starts at 0 (Gemma)."""
    weightless: bool = False
    """Leave the scale out (OLMo)."""

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weightless and (self.bias or self.zero_centred):
            raise MaxlmError(
                "a weightless norm with bias or zero_centred", fix="leave them out"
            )
        return self


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4)."""

    def __init__(self, config: NormConfig, size: int, context: BuildContext):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        zeros = jax.nn.initializers.zeros
        ones = jax.nn.initializers.ones
        initial_scale = zeros if config.zero_centred else ones
        # No logical axis: the scale is whole on every device, a few kilobytes that
        # every element of the residual stream needs.
        self.scale = (
            None
            if config.weightless
            else declare((size,), (None,), initial_scale, "vector")
        )
        self.bias = declare((size,), (None,), zeros, "vector") if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] → the same shape in the compute dtype."""
        dtype = accumulation_dtype(self.dtype)
        scale = None
        bias = None
        if self.scale is not None:
            scale = materialize(self.scale, self.rules, dtype)
        if self.bias is not None:
            bias = materialize(self.bias, self.rules, dtype)
        return save_inputs_only(self._normalise)(x, scale, bias)

    def _normalise(
        self, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None
    ) -> jax.Array:
        x = x.astype(accumulation_dtype(self.dtype))
        if self.config.kind == "layernorm":
            x -= jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(variance + self.config.eps)
        if scale is not None:
            y *= 1 + scale if self.config.zero_centred else scale
        if bias is not None:
            y += bias
        return y.astype(self.dtype)
