"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), as Qwen3-Next, Qwen3.5 and
OLMo-Hybrid have it.

Shapes: B batch, S sequence, D model, H key heads, N value heads, K and V their sizes.
"""

from typing import Literal, Self

import jax
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.delta_rule import (
    DeltaRule,
    DeltaRuleInputs,
    DeltaRuleSizes,
    compute_beta,
    compute_log_decay,
    draw_log_uniform,
    name_projections,
)
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mamba import spread_step_sizes
from maxlm.models.layers.norm import NormConfig
from maxlm.models.params import declare, materialize

_MAPS = ("query", "key", "value", "gate", "beta", "decay")


class GatedDeltaNetConfig(Config):
    """Heads with states that forget by a factor a token, and are corrected by a delta
    rule."""

    kind: Literal["gated_delta_net"] = "gated_delta_net"

    num_heads: int = Field(gt=0)
    """Value heads, each with a state of key_dim · value_dim numbers."""
    num_key_heads: int = Field(gt=0)
    """Heads of queries and keys; each serves as many value heads as the others."""
    key_dim: int = Field(gt=0)
    """Size of a query or key head."""
    value_dim: int = Field(gt=0)
    """Size of a value head."""
    conv_width: int = Field(default=4, gt=1)
    """Tokens that the convolutions of queries, keys and values see: a token and those
    before it."""
    negative_eigenvalues: bool = False
    """Corrections of up to 2, not 1, so that a state may change its sign along a key
    (Grazzi et al. 2024, arXiv 2411.12537; OLMo-Hybrid)."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Of the norm of outputs; null: the model's."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_key_heads:
            raise MaxlmError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_key_heads={self.num_key_heads}",
                fix="let every key head serve as many value heads as the others",
            )
        return self

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns heads of the same ratios, for a smoke run: two key heads with up to
        four value heads each, values up to four times as wide as keys."""
        del seq_len
        num_key_heads = min(2, self.num_key_heads)
        group_size = min(self.num_heads // self.num_key_heads, 4)
        widening = min(max(1, round(self.value_dim / self.key_dim)), 4)
        return self.model_copy(
            update={
                "num_heads": num_key_heads * group_size,
                "num_key_heads": num_key_heads,
                "key_dim": head_dim,
                "value_dim": widening * head_dim,
            }
        )


class GatedDeltaNet(DeltaRule):
    """``out(norm(rule(q, k, v), silu(gate)))``, with q, k and v behind short
    convolutions and silu, q and k of length one; see
    :mod:`maxlm.models.layers.delta_rule`.

    Parameters beside those of :class:`DeltaRule`: ``gate`` [D, N, V], ``beta`` and
    ``decay`` [D, N], ``A_log`` and ``dt_bias`` [N].
    """

    name = "gated_delta_net"
    joint_projections = (_MAPS,)
    """See :class:`~maxlm.models.layers.attention.Attention`."""

    def __init__(
        self, config: GatedDeltaNetConfig, norm: NormConfig, context: BuildContext
    ):
        sizes = DeltaRuleSizes(
            config.num_heads,
            config.num_key_heads,
            config.key_dim,
            config.value_dim,
            config.conv_width,
        )
        super().__init__(
            sizes,
            context,
            norm_eps=config.norm_eps or norm.eps,
            gate_activation="silu",
        )
        self.config = config
        residual = {"embed": context.d_model}
        heads = {"heads": config.num_heads}
        value_heads = {**heads, "head_dim": config.value_dim}
        self.gate = Linear(residual, value_heads, context, bias=False)
        self.beta = Linear(residual, heads, context, bias=False)
        self.decay = Linear(residual, heads, context, bias=False)
        # As the paper's code begins them: rates up to 16, steps from .001 to .1.
        shape = (config.num_heads,)
        self.A_log = declare(shape, ("heads",), draw_log_uniform(0.01, 16.0), "vector")
        self.dt_bias = declare(
            shape, ("heads",), spread_step_sizes(1e-3, 0.1), "vector"
        )

    def map_input(self, x: jax.Array) -> DeltaRuleInputs:
        """See :class:`DeltaRule`."""
        maps = [getattr(self, name) for name in _MAPS]
        q, k, v, gate, beta, decay = name_projections(*project(x, *maps))
        wide = accumulation_dtype(self.dtype)
        log_decay = compute_log_decay(
            decay,
            materialize(self.A_log, self.rules, wide),
            materialize(self.dt_bias, self.rules, wide),
        )
        largest = 2.0 if self.config.negative_eigenvalues else 1.0
        return DeltaRuleInputs(q, k, v, log_decay, compute_beta(beta, largest), gate)

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`."""
        matrices = (
            MatrixGroup(tuple(f"{name}.kernel" for name in _MAPS)),
            MatrixGroup(("out.kernel",), "heads"),
        )
        return self.count_costs(matrices, decays_by_channel=False)
