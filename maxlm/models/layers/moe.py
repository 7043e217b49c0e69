"""Mixture of experts: many feed-forward layers, of which each token passes a few.

A router scores every token against every expert; the k best serve it, and their outputs
are added, weighted by score. Parameters grow with the number of experts, work with k
alone.
"""

from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.costs import ExpertCosts, LayerCosts, group_matrices
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import compute_residual_std
from maxlm.models.layers.mlp import ACTIVATIONS, Activation, Mlp, MlpConfig
from maxlm.models.params import declare, materialize, read_weight, truncated_normal
from maxlm.parallel import dispatch, experts
from maxlm.parallel import local as shards
from maxlm.sharding import AxisRules


class MoeConfig(Config):
    """A mixture of experts, and how tokens are routed to them."""

    kind: ClassVar[str] = "moe"

    num_experts: int = Field(gt=0)
    """Routed experts."""
    experts_per_token: int = Field(gt=0)
    """Routed experts that serve a token (k)."""
    d_ff: int = Field(gt=0)
    """Width of one expert's hidden layer."""
    activation: Activation = "silu"
    gated: bool = True
    """Whether experts are gated, as in a dense layer: silu + gated is SwiGLU."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts that serve every token with weight 1 (DeepSeekMoE, arXiv 2401.06066, eq.
    9); n of them are one dense layer of width n · d_ff."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: experts compete for a token (Mixtral, DeepSeek-V2, Qwen). sigmoid: each
    is scored by itself (DeepSeek-V3, arXiv 2412.19437, eq. 15)."""
    renormalise: bool = True
    """Divide a token's k weights by their sum (Mixtral, DeepSeek-V3). Otherwise they
    are the scores themselves (DeepSeek-V2, OLMoE), small where scores are spread over
    many experts."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the weights after that; DeepSeek-V3 has 2.5."""
    selection_bias: bool = False
    """A bias for each expert, added to scores to choose by and to nothing else, which a
    rule moves towards equal load: balance without a loss that pulls at the model (arXiv
    2408.15664)."""
    groups: int = Field(default=1, gt=0)
    """Equal groups of consecutive experts, say one a node; a token's experts come from
    few of them (arXiv 2405.04434, §2.1.3)."""
    groups_per_token: int = Field(default=1, gt=0)
    """Groups that a token's experts come from; all of them: no limit."""
    group_score: Literal["max", "top2"] = "max"
    """A group's rank by its best expert's score (DeepSeek-V2), or by the sum of its
    best two (DeepSeek-V3)."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Coefficient of E · Σ_e f_e · P_e: f_e the share of all assignments that expert e
    gets, P_e its mean share of the scores; 1 when balanced (Switch, arXiv 2101.03961,
    eq. 4–6). Both are taken over the micro-batch on all devices. Implementations whose
    f sums to k want it 1/k as large."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the mean squared log-sum-exp of router logits, which keeps them
    small (ST-MoE, arXiv 2202.08906, eq. 5, who use 1e-3)."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """dropless: every token is served, by ragged exchanges and products; receive
    buffers have room for the worst case. capacity: an expert serves a bounded share of
    each sequence and drops the rest, by dense exchanges and batched products (GShard,
    arXiv 2006.16668, §2.2); cheaper where ragged operations are slow, and the sequence
    may not be split over devices."""
    capacity_factor: float = Field(default=1.25, gt=0)
    """Room of an expert in a sequence, over its share if load were equal (with
    capacity)."""

    @model_validator(mode="after")
    def _consistent(self):
        size = self.num_experts // self.groups
        met = self.groups_per_token
        k = f"experts_per_token={self.experts_per_token}"
        if self.experts_per_token > self.num_experts:
            what = f"{k} of num_experts={self.num_experts}"
            raise MaxlmError(what, fix="choose at most as many experts as there are")
        if self.num_experts % self.groups:
            what = f"num_experts={self.num_experts} is not a multiple of groups={self.groups}"
            raise MaxlmError(what, fix="make groups a divisor of num_experts")
        if met > self.groups:
            what = f"groups_per_token={met} of groups={self.groups}"
            raise MaxlmError(what, fix="choose at most as many groups as there are")
        if self.experts_per_token > met * size:
            what = (
                f"{k} cannot come from groups_per_token={met} groups of {size} experts"
            )
            fix = "raise groups_per_token, or lower experts_per_token or groups"
            raise MaxlmError(what, fix=fix)
        if self.group_score == "top2" and size < 2:
            what = f"group_score=top2 with groups of {size} expert"
            raise MaxlmError(what, fix="use group_score: max, or fewer groups")
        return self

    def limit_experts(self, max_experts: int) -> Self:
        """Returns the config with at most so many experts (4 or more), of which a token
        meets half at most; a token that met some groups alone still does."""
        if self.num_experts <= max_experts:
            return self
        groups = min(self.groups, max_experts // 2)  # of two or more
        size = max_experts // groups
        per_token = max(1, groups * self.groups_per_token // self.groups)
        met = min(self.experts_per_token, groups * size // 2, per_token * size)
        return self.model_copy(
            update={
                "num_experts": groups * size,
                "experts_per_token": met,
                "groups": groups,
                "groups_per_token": per_token,
            }
        )


class MoeAux(NamedTuple):
    """Losses and statistics of a layer, fp32, the same on all devices."""

    loss: jax.Array
    """Scalar to add to a loss summed over tokens: balance and z losses times their
    coefficients and the number of tokens counted. Zero plus a gradient for the
    selection bias; see ``Moe``."""
    load: jax.Array
    """[E]: assignments to each expert, dropped ones included."""
    dropped: jax.Array
    """Scalar: assignments that no expert had room for."""


class Moe(nnx.Module):
    """``shared(x) + Σ_j weight_j · expert_j(x)`` over the k experts of each token.

    Parameters: ``router`` [D, E], ``gate`` and ``up`` [E, D, F], ``down`` [E, F, D],
    ``shared`` (an :class:`Mlp`), and ``selection_bias`` [E]. The last learns by a rule:
    its gradient is load − mean load, whatever the losses are, and it is declared
    ``sign_update``: optimizers step against its sign by a fixed amount, which is
    algorithm 1 of arXiv 2408.15664. Since the load is that of all devices and gradients
    add up over micro-batches, the step does not depend on the layout.
    """

    name = "moe"

    def __init__(
        self,
        config: MoeConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
    ):
        self.config, self.rules, self.dtype = config, rules, dtype
        e, f = config.num_experts, config.d_ff
        # Like an output head it classifies tokens; it is no map between hidden layers.
        normal = truncated_normal(init_std)
        self.router = declare((d_model, e), ("embed", None), normal, "table", (0,))
        inner, outer = (
            ("expert", "expert_embed", "mlp"),
            ("expert", "mlp", "expert_embed"),
        )
        maps: dict[str, Any] = {"init": normal, "contracting_dims": (1,)}
        gated = config.gated
        self.gate = (
            declare((e, d_model, f), inner, role="matrix", **maps) if gated else None
        )
        self.up = declare((e, d_model, f), inner, role="matrix", **maps)
        out_of = truncated_normal(compute_residual_std(init_std, num_layers))
        self.down = declare(
            (e, f, d_model), outer, out_of, "matrix", contracting_dims=(1,)
        )
        zeros = (e,), (None,), jax.nn.initializers.zeros
        bias = (
            declare(*zeros, "vector", sign_update=True)
            if config.selection_bias
            else None
        )
        self.selection_bias = bias
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        width = max(1, config.shared_experts) * f
        kind = config.activation
        dense = MlpConfig(d_ff=width, activation=kind, gated=gated)
        shared = config.shared_experts > 0
        self.shared = (
            Mlp(dense, d_model, num_layers, init_std, **kw) if shared else None
        )

    def feed(
        self, x: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Aux]:
        """See :class:`~maxlm.models.blocks.FeedForward`."""
        counted = None
        if segment_ids is not None:
            counted = reshard(
                segment_ids != 0, shards.make_spec(shards.get_layout(x)[:2])
            )
        y, routed = self(x, counted)
        load = routed.load
        sums = {
            "expert_load": load.mean(),
            "expert_load_max": load.max(),
            "expert_load_min": load.min(),
            "expert_dropped": routed.dropped / load.size,
        }
        return y, Aux(routed.loss, sums)

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        experts = ExpertCosts(
            router="router",
            experts_per_token=config.experts_per_token,
            num_experts=config.num_experts,
            capacity_factor=config.capacity_factor
            if config.dispatch == "capacity"
            else None,
            has_shared=self.shared is not None,
        )
        return LayerCosts(group_matrices(self), experts=experts)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, MoeAux]:
        """x [B, S, D] → the same in the compute dtype, and what there is to add to the
        loss and to log. ``mask``: bool [B, S], laid out as x; False for padding, which
        no routed expert serves and no statistic counts. None: all tokens."""
        config = self.config
        x = x.astype(self.dtype)
        wide = accumulation_dtype(self.dtype)
        bias = None
        logits = jnp.einsum(
            "bsd,de->bse",
            x.astype(wide),
            materialize(self.router, self.rules, wide),
            precision=lax.Precision.HIGHEST,  # a TPU multiplies fp32 in bf16 otherwise
            out_sharding=shards.make_spec((*shards.get_layout(x)[:2], ())),
        )
        if self.selection_bias is not None:
            bias = read_weight(self.selection_bias, self.rules, wide).value
        routing = route(logits, bias, config)
        if mask is None:
            mask = jnp.ones_like(logits[..., 0], dtype=bool)
        chosen = jnp.where(mask[..., None], routing.expert_ids, config.num_experts)
        numbers = jnp.arange(config.num_experts)
        load = (chosen[..., None] == numbers).sum((1, 2), dtype=jnp.float32)  # [B, E]
        room = None
        dropped = jnp.zeros((), jnp.float32)
        if config.dispatch == "capacity":
            size = x.shape[1], config.experts_per_token, config.num_experts
            room = dispatch.compute_expert_capacity(*size, config.capacity_factor)
            dropped = jnp.maximum(load - room, 0).sum()
        load = load.sum(0)
        loss = router_loss(logits, routing.scores, load, mask, config)
        if bias is not None:
            rule = lax.stop_gradient(load - load.mean())
            loss += jnp.sum(rule * (bias - lax.stop_gradient(bias)))
        kernels = {
            name: read_weight(param, self.rules, self.dtype)
            for name, param in {
                "gate": self.gate,
                "up": self.up,
                "down": self.down,
            }.items()
            if param is not None
        }
        y = experts.apply_experts(
            x,
            routing.weights,
            chosen,
            {name: kernel.value for name, kernel in kernels.items()},
            activation=ACTIVATIONS[config.activation],
            kernel_layouts={
                name: kernel.compute_layout for name, kernel in kernels.items()
            },
            expert_capacity=room,
        )
        if self.shared is not None:
            y = y + self.shared(x)
        return y, MoeAux(loss, load, dropped)


class Routing(NamedTuple):
    scores: jax.Array
    """fp32 [B, S, E]."""
    weights: jax.Array
    """fp32 [B, S, k]."""
    expert_ids: jax.Array
    """int32 [B, S, k], best first, ties to the lower number."""


def route(logits: jax.Array, bias: jax.Array | None, config: MoeConfig) -> Routing:
    """Chooses each token's experts and their weights, from logits fp32 [B, S, E]; the
    bias, fp32 [E], is added to the scores that experts and groups are chosen by.
    Differentiable in the logits through scores and weights; not in the bias."""
    scores = (jax.nn.softmax if config.score == "softmax" else jax.nn.sigmoid)(logits)
    ranked = lax.stop_gradient(scores if bias is None else scores + bias)
    if config.groups_per_token < config.groups:
        size = config.num_experts // config.groups
        grouped = ranked.reshape(*ranked.shape[:-1], config.groups, size)
        best = lax.top_k(grouped, 1 if config.group_score == "max" else 2)[0].sum(-1)
        _, kept = lax.top_k(best, config.groups_per_token)
        allowed = (kept[..., None] == jnp.arange(config.groups)).any(-2)
        ranked = jnp.where(jnp.repeat(allowed, size, axis=-1), ranked, -jnp.inf)
    _, chosen = lax.top_k(ranked, config.experts_per_token)
    # Not take_along_axis: its gradient would be a scatter into [B, S, E].
    onehot = chosen[..., None] == jnp.arange(config.num_experts)
    weights = jnp.where(onehot, scores[..., None, :], 0.0).sum(-1)
    if config.renormalise:
        # The sum of sigmoids can underflow to 0.
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(scores, weights * config.scale, chosen)


def router_loss(
    logits: jax.Array,
    scores: jax.Array,
    load: jax.Array,
    mask: jax.Array,
    config: MoeConfig,
) -> jax.Array:
    """Computes balance and z losses times coefficients and counted tokens, an fp32
    scalar, from logits and scores [B, S, E], assignments to each expert [E], all fp32,
    and bool [B, S]."""
    loss = jnp.zeros((), jnp.float32)
    if config.balance_loss:
        shares = scores
        if config.score == "sigmoid":
            shares = scores / (
                scores.sum(-1, keepdims=True) + 1e-20
            )  # DeepSeek-V3, eq. 19
        mass = jnp.where(mask[..., None], shares, 0.0).sum((0, 1))
        tokens = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
        f, p = (
            lax.stop_gradient(load) / (tokens * config.experts_per_token),
            mass / tokens,
        )
        loss += config.balance_loss * tokens * config.num_experts * jnp.sum(f * p)
    if config.z_loss:
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        loss += config.z_loss * jnp.where(mask, squares, 0.0).sum()
    return loss
