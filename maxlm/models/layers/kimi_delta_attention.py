"""Kimi Delta Attention (Kimi Team 2025, Kimi Linear, arXiv 2510.26692, §3): a gated
delta rule whose states forget each key channel by a factor of its own.

Shapes: B batch, S sequence, D model, N heads, K their size, R rank of narrow maps.
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

_COMMON_MAPS = ("query", "key", "value", "beta")
_NARROW_MAPS = (*_COMMON_MAPS, "decay_down", "gate_down")
_WHOLE_MAPS = (*_COMMON_MAPS, "decay", "gate")


class KimiDeltaAttentionConfig(Config):
    """Heads with states that forget by a factor a key channel and token, and are
    corrected by a delta rule."""

    kind: Literal["kimi_delta_attention"] = "kimi_delta_attention"

    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    """Size of a query, key or value head."""
    rank: int | None = Field(default=None, gt=0)
    """Width that decays and gates are squeezed through; null: head_dim."""
    squeezed: bool = True
    """Make decays and gates of narrow vectors; false: one map of the layer's input
    makes each (Ling 3)."""
    min_log_decay: float | None = Field(default=None, lt=0)
    """The least logarithm of a factor, which is then this · sigmoid(rate · (decay +
    dt_bias)) (Ling 3's is −5); null: −rate · softplus(decay + dt_bias), which has no
    least."""
    conv_width: int = Field(default=4, gt=1)
    """Tokens that the convolutions of queries, keys and values see: a token and those
    before it."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Of the norm of outputs; null: the model's."""

    @model_validator(mode="after")
    def _rank_is_used(self) -> Self:
        if self.rank is not None and not self.squeezed:
            raise MaxlmError(
                f"rank={self.rank} with squeezed: false", fix="leave one of them out"
            )
        return self

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns a few small heads, for a smoke run."""
        del seq_len
        changes = {
            "num_heads": min(4, self.num_heads),
            "head_dim": head_dim,
            "rank": None if self.rank is None else head_dim,
        }
        return self.model_copy(update=changes)


class KimiDeltaAttention(DeltaRule):
    """``out(norm(rule(q, k, v), sigmoid(gate)))``, with q, k and v behind short
    convolutions and silu, q and k of length one; see
    :mod:`maxlm.models.layers.delta_rule`.

    Parameters beside those of :class:`DeltaRule`: ``beta`` [D, N]; ``decay_down`` [D,
    R], ``decay_up`` [R, N, K], ``A_log`` [N] and ``dt_bias`` [N, K]; ``gate_down`` [D,
    R] and ``gate_up`` [R, N, K]. Where they are not squeezed, ``decay`` and ``gate`` [D,
    N, K] in place of their two maps each.
    """

    name = "kimi_delta_attention"

    def __init__(
        self, config: KimiDeltaAttentionConfig, norm: NormConfig, context: BuildContext
    ):
        num_heads = config.num_heads
        head_dim = config.head_dim
        sizes = DeltaRuleSizes(
            num_heads, num_heads, head_dim, head_dim, config.conv_width
        )
        super().__init__(
            sizes,
            context,
            norm_eps=config.norm_eps or norm.eps,
            gate_activation="sigmoid",
        )
        rank = config.rank or head_dim
        residual = {"embed": context.d_model}
        heads = {"heads": num_heads}
        channels = {**heads, "head_dim": head_dim}
        self.config = config
        self.beta = Linear(residual, heads, context, bias=False)
        if config.squeezed:
            # Stored over the same mesh axes as maps of the residual stream.
            narrow = {"embed": rank}
            self.decay_down = Linear(residual, {"latent": rank}, context, bias=False)
            self.decay_up = Linear(narrow, channels, context, bias=False)
            self.gate_down = Linear(residual, {"latent": rank}, context, bias=False)
            self.gate_up = Linear(narrow, channels, context, bias=False)
        else:
            self.decay = Linear(residual, channels, context, bias=False)
            self.gate = Linear(residual, channels, context, bias=False)
        # As the published code begins them: rates from 1 to 16, steps from .001 to .1.
        self.A_log = declare(
            (num_heads,), ("heads",), draw_log_uniform(1.0, 16.0), "vector"
        )
        self.dt_bias = declare(
            (num_heads, head_dim),
            ("heads", "head_dim"),
            spread_step_sizes(1e-3, 0.1),
            "vector",
        )

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        return (_NARROW_MAPS if self.config.squeezed else _WHOLE_MAPS,)

    def map_input(self, x: jax.Array) -> DeltaRuleInputs:
        """See :class:`DeltaRule`."""
        maps = [getattr(self, name) for name in self.joint_projections[0]]
        q, k, v, beta, decay, gate = name_projections(*project(x, *maps))
        if self.config.squeezed:
            decay = self.decay_up(decay)
            (gate,) = name_projections(self.gate_up(gate))
        wide = accumulation_dtype(self.dtype)
        log_decay = compute_log_decay(
            decay,
            materialize(self.A_log, self.rules, wide),
            materialize(self.dt_bias, self.rules, wide),
            least=self.config.min_log_decay,
        )
        return DeltaRuleInputs(q, k, v, log_decay, compute_beta(beta, 1.0), gate)

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`."""
        maps = tuple(f"{name}.kernel" for name in self.joint_projections[0])
        matrices = [MatrixGroup(maps, kept_products=maps)]
        if self.config.squeezed:
            matrices += [
                MatrixGroup(("decay_up.kernel",), "latent", kept_products=()),
                MatrixGroup(("gate_up.kernel",), "latent"),
            ]
        matrices.append(MatrixGroup(("out.kernel",), "heads"))
        return self.count_costs(tuple(matrices), decays_by_channel=True)
