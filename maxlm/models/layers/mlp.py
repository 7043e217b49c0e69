"""Position-wise feed-forward layers."""

from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from maxlm.config import Config
from maxlm.models.aux import Aux
from maxlm.models.layers.linear import Linear, compute_residual_std, project
from maxlm.models.remat import save_inputs_only
from maxlm.sharding import AxisRules

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


class MlpConfig(Config):
    """A multi-layer perceptron with one hidden layer."""

    kind: ClassVar[str] = "mlp"

    d_ff: int = Field(gt=0)
    """Width of the hidden layer."""
    activation: Activation = "silu"
    gated: bool = True
    """Multiply the activated projection by a second, linear one: silu + gated is SwiGLU
    (Shazeer 2020, eq. 6). A third matrix: d_ff is usually 2/3 of the ungated width for
    equal parameters."""
    bias: bool = False


class Mlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` when not
    gated."""

    name = "mlp"
    joint_projections = (("gate", "up"),)

    def __init__(
        self,
        config: MlpConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
    ):
        self.config = config
        inner, outer = {"mlp": config.d_ff}, {"embed": d_model}
        kw: dict[str, Any] = {"bias": config.bias, "rules": rules, "dtype": dtype}
        self.gate = Linear(outer, inner, std=init_std, **kw) if config.gated else None
        self.up = Linear(outer, inner, std=init_std, **kw)
        self.down = Linear(
            inner, outer, std=compute_residual_std(init_std, num_layers), **kw
        )

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """See :class:`~maxlm.models.blocks.FeedForward`."""
        return self(x), Aux()

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] → [B, S, D]."""
        activate = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            up = checkpoint_name(self.up(x), "mlp_up")
            hidden = save_inputs_only(activate)(up)
        else:
            gate, up = project(x, self.gate, self.up)
            gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
            hidden = save_inputs_only(lambda gate, up: activate(gate) * up)(gate, up)
        return self.down(hidden, seq_axis="residual")
