"""Position-wise feed-forward layers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import expm1, log
from statistics import NormalDist
from typing import ClassVar, Literal, NamedTuple

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
from maxlm.models.params import declare, materialize
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


_INITIAL_SLOPES = (0.8, 0.8)
"""a and b of :class:`Xielu` when training begins."""


class Xielu(Config):
    """An unbounded activation with two learnt slopes of a layer (Huang & Schlag 2024,
    arXiv 2411.13010, §3): ``a·x² + beta·x`` above 0, ``b·(e^x − 1 − x) + beta·x`` below,
    with a = softplus(positive_slope) and b = beta + softplus(negative_slope)."""

    kind: Literal["xielu"] = "xielu"
    beta: float = Field(default=0.5, gt=0)
    """Slope at 0."""
    eps: float = Field(default=1e-6, gt=0)
    """Exponents are at most −eps."""

    @model_validator(mode="after")
    def _slope_can_begin(self):
        if self.beta >= _INITIAL_SLOPES[1]:
            raise MaxlmError(
                f"beta={self.beta} is not below {_INITIAL_SLOPES[1]}, the slope that "
                "training begins with",
                fix="lower it",
            )
        return self

    def __call__(
        self, x: jax.Array, positive_slope: jax.Array, negative_slope: jax.Array
    ) -> jax.Array:
        """x [..., F], slopes fp32 [1] → [..., F] in x's dtype, computed in that of
        slopes."""
        dtype = x.dtype
        x = x.astype(positive_slope.dtype)
        curvature = jax.nn.softplus(positive_slope)
        below = jnp.expm1(jnp.minimum(x, -self.eps)) - x
        below *= self.beta + jax.nn.softplus(negative_slope)
        y = jnp.where(x > 0, curvature * x * x, below) + self.beta * x
        return y.astype(dtype)


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


def check_gated(activation: Activation | ClampedSwiglu | Xielu, gated: bool) -> None:
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
    activation: Activation | ClampedSwiglu | Xielu = "silu"
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
        if self.sparsity > 0 and isinstance(self.activation, Xielu):
            raise MaxlmError(
                f"sparsity={self.sparsity} of xielu, which shuts nothing off",
                where="sparsity",
                fix="set it to 0, or use another activation",
            )
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


class HiddenTerms(NamedTuple):
    """Terms that are added to the projections that a hidden layer is made of."""

    up: jax.Array
    """[B, S, F]."""
    gate: jax.Array | None
    """[B, S, F]; None: the layer has no gate."""


class Mlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` when not
    gated. With :class:`Xielu` it has parameters ``positive_slope`` and
    ``negative_slope`` [1]."""

    name = "mlp"
    joint_projections = (("gate", "up"),)

    def __init__(self, config: MlpConfig, context: BuildContext):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
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
        unit = config.activation
        positive_slope = None
        negative_slope = None
        if isinstance(unit, Xielu):
            positive, negative = _INITIAL_SLOPES
            positive_slope = _declare_slope(positive)
            negative_slope = _declare_slope(negative - unit.beta)
        self.positive_slope = positive_slope
        self.negative_slope = negative_slope

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """See :class:`~maxlm.models.blocks.FeedForward`."""
        return self(x), Aux()

    def __call__(self, x: jax.Array, terms: HiddenTerms | None = None) -> jax.Array:
        """x [B, S, D] → [B, S, D]. ``terms``: of a layer that has maps of its own beside
        these."""
        # The names are those by which remat policies keep values (models/remat.py).
        if self.gate is None:
            up = self.up(x)
            if terms is not None:
                up = up + terms.up
            up = checkpoint_name(up, "mlp_up")
            hidden = self._activate(up, None)
        else:
            gate, up = project(x, self.gate, self.up)
            if terms is not None:
                assert terms.gate is not None
                gate = gate + terms.gate
                up = up + terms.up
            gate = checkpoint_name(gate, "mlp_gate")
            up = checkpoint_name(up, "mlp_up")
            if self.config.gate_scale != 1:
                gate = gate * self.config.gate_scale
            hidden = self._activate(up, gate)
        y = self.down(hidden, seq_axis="residual")
        return y if self.config.output_scale == 1 else y * self.config.output_scale

    def _activate(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        """Makes the hidden layer [..., F] of up and maybe gate [..., F]."""
        unit = self.config.activation
        if not isinstance(unit, Xielu):
            activate = partial(apply_activation, unit, self.config.sparsity)
            return save_inputs_only(activate)(up, gate)
        assert self.positive_slope is not None
        assert self.negative_slope is not None
        wide = accumulation_dtype(self.dtype)
        positive_slope = materialize(self.positive_slope, self.rules, wide)
        negative_slope = materialize(self.negative_slope, self.rules, wide)
        if gate is None:
            return save_inputs_only(unit)(up, positive_slope, negative_slope)
        return save_inputs_only(unit)(gate, positive_slope, negative_slope) * up


def apply_activation(
    unit: Activation | ClampedSwiglu,
    sparsity: float,
    up: jax.Array,
    gate: jax.Array | None,
) -> jax.Array:
    """Makes the hidden layer [..., F] of up and maybe gate [..., F], of which the
    activated one is cut below its quantile ``sparsity`` first; 0: it is not."""
    if sparsity > 0 and gate is None:
        up = cut_below_quantile(up, sparsity)
    elif sparsity > 0:
        assert gate is not None
        gate = cut_below_quantile(gate, sparsity)
    return HiddenActivation(unit)(up, gate)


def _declare_slope(value: float) -> nnx.Param:
    """Declares a number [1] whose softplus begins as ``value``."""
    initializer = jax.nn.initializers.constant(log(expm1(value)))
    return declare((1,), (None,), initializer, "vector")
