"""Position-wise feed-forward layers."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.build_context import BuildContext
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import Linear, project
from maxlm.models.remat import save_inputs_only

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # Primer (So et al. 2021, arXiv 2109.08668, §3): Nemotron, Arcee.
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


class ClampedSwiglu(Config):
    """A gated unit of bounded inputs (gpt-oss, arXiv 2508.10925, §2.2, and its published
    code): ``(up + up_offset) · gate · sigmoid(alpha · gate)``, where first the gate is
    cut off above ``limit`` and ``up`` at ± ``limit``."""

    kind: Literal["clamped_swiglu"] = "clamped_swiglu"
    alpha: float = Field(default=1.702, gt=0)
    """Slope of the sigmoid; 1 is that of silu, 1.702 nearly that of gelu."""
    limit: float = Field(default=7.0, gt=0)
    """Bound of both projections."""
    up_offset: float = 1.0
    """Term added to ``up``: with 1 a unit whose ``up`` is 0 passes its gate on."""


@dataclass(frozen=True)
class HiddenActivation:
    """Hidden layer of a feed-forward, from the projections that it is made of.

    Args:
        activation: element-wise, or a gated unit of its own.
    """

    activation: Activation | ClampedSwiglu

    def __call__(self, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """up [..., F] and maybe gate [..., F] → [..., F] in their dtype."""
        unit = self.activation
        if isinstance(unit, ClampedSwiglu):
            assert gate is not None  # checked by the layer's config
            gate = jnp.minimum(gate, unit.limit)
            up = jnp.clip(up, -unit.limit, unit.limit)
            return (up + unit.up_offset) * (gate * jax.nn.sigmoid(unit.alpha * gate))
        activate = ACTIVATIONS[unit]
        return activate(up) if gate is None else activate(gate) * up


def check_gated(activation: Activation | ClampedSwiglu, gated: bool) -> None:
    """Raises MaxlmError: an activation that needs a gate, in a layer without one."""
    if isinstance(activation, ClampedSwiglu) and not gated:
        raise MaxlmError(
            f"activation.kind={activation.kind} without a gate", fix="set gated to true"
        )


class MlpConfig(Config):
    """A multi-layer perceptron with one hidden layer."""

    kind: ClassVar[str] = "mlp"

    d_ff: int = Field(gt=0)
    """Width of the hidden layer."""
    activation: Activation | ClampedSwiglu = "silu"
    gated: bool = True
    """Multiply the activated projection by a second, linear one: silu + gated is SwiGLU
    (Shazeer 2020, eq. 6). A third matrix: d_ff is usually 2/3 of the ungated width for
    equal parameters."""
    bias: bool = False
    gate_scale: float = Field(default=1.0, gt=0)
    """Factor on the projection that is activated, with a gate (Falcon-H1)."""
    output_scale: float = Field(default=1.0, gt=0)
    """Factor on the output (Falcon-H1)."""
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hidden layer that is shut off, were what is activated normal over
    it: what lies below that quantile becomes 0, the rest counts from there (Gemma 3n);
    0: none is."""

    @model_validator(mode="after")
    def _gated_unit_has_a_gate(self):
        check_gated(self.activation, self.gated)
        return self


def cut_below_quantile(x: jax.Array, share: float) -> jax.Array:
    """Returns max(x − quantile, 0) of x [..., F]: the ``share`` quantile of a normal
    distribution with x's mean and deviation over F (the Gaussian top-k of Spark
    Transformer, You et al. 2025, arXiv 2506.06644, eq. 4). Sums are fp32 or wider."""
    wide = x.astype(accumulation_dtype(x.dtype))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True))
    quantile = mean + deviation * NormalDist().inv_cdf(share)
    return jax.nn.relu(wide - quantile).astype(x.dtype)


class Mlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` when not
    gated."""

    name = "mlp"
    joint_projections = (("gate", "up"),)

    def __init__(self, config: MlpConfig, context: BuildContext):
        self.config = config
        hidden = {"mlp": config.d_ff}
        residual = {"embed": context.d_model}
        self.gate = (
            Linear(residual, hidden, context, bias=config.bias)
            if config.gated
            else None
        )
        self.up = Linear(residual, hidden, context, bias=config.bias)
        self.down = Linear(
            hidden, residual, context, bias=config.bias, std=context.residual_std
        )

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """See :class:`~maxlm.models.blocks.FeedForward`."""
        return self(x), Aux()

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] → [B, S, D]."""
        activate = save_inputs_only(self._activate)

        # The names are those by which remat policies keep values (models/remat.py).
        if self.gate is None:
            up = checkpoint_name(self.up(x), "mlp_up")
            hidden = activate(up)
        else:
            gate, up = project(x, self.gate, self.up)
            gate = checkpoint_name(gate, "mlp_gate")
            up = checkpoint_name(up, "mlp_up")
            if self.config.gate_scale != 1:
                gate = gate * self.config.gate_scale
            hidden = activate(up, gate)
        y = self.down(hidden, seq_axis="residual")
        return y if self.config.output_scale == 1 else y * self.config.output_scale

    def _activate(self, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        """Returns the hidden layer [B, S, F] from its projections."""
        share = self.config.sparsity
        if share > 0:
            if gate is None:
                up = cut_below_quantile(up, share)
            else:
                gate = cut_below_quantile(gate, share)
        return HiddenActivation(self.config.activation)(up, gate)
