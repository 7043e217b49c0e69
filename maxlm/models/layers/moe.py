"""Mixture of experts: many feed-forward layers, of which each token passes a few.

A router scores every token against every expert; the k best serve it, and their outputs
are added, weighted by score. Parameters grow with the number of experts, work with k
alone.

Shapes: B batch, S sequence, D model, E experts, F width of an expert, k experts of a
token, C width of latent experts' inputs (D without them).
"""

from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.build_context import BuildContext
from maxlm.models.costs import ExpertRouting, LayerCosts, group_matrices
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.mlp import (
    Activation,
    ClampedSwiglu,
    HiddenActivation,
    Mlp,
    MlpConfig,
    check_gated,
)
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import declare, materialize, read_weight, truncated_normal
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.dispatch import compute_expert_capacity
from maxlm.parallel.experts import apply_experts
from maxlm.parallel.local import get_layout, make_spec


class MoeConfig(Config):
    """A mixture of experts, and how tokens are routed to them."""

    kind: ClassVar[str] = "moe"

    num_experts: int = Field(gt=0)
    """Routed experts."""
    experts_per_token: int = Field(gt=0)
    """Routed experts that serve a token (k)."""
    d_ff: int = Field(gt=0)
    """Width of one expert's hidden layer."""
    activation: Activation | ClampedSwiglu = "silu"
    gated: bool = True
    """Whether experts are gated, as in a dense layer: silu + gated is SwiGLU."""
    bias: bool = False
    """Offsets on the projections of all experts (gpt-oss); that of an expert's output
    is weighted like the output."""
    latent_dim: int | None = Field(default=None, gt=0)
    """Width that tokens are squeezed to before routed experts, whose weighted sum is
    widened again (Nemotron 3): rows that cross the wire and experts' matrices are as
    much smaller. null: experts read the residual stream."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts that serve every token with weight 1 (DeepSeekMoE, arXiv 2401.06066, eq.
    9); n of them are one dense layer of width n · d_ff."""
    shared_d_ff: int | None = Field(default=None, gt=0)
    """Width of the shared experts' dense layer; null: shared_experts · d_ff."""
    shared_gate: bool = False
    """Multiply the shared experts' output by the sigmoid of a linear map of the token
    to one number (Qwen2-MoE, Qwen3-Next)."""
    router_bias: bool = False
    """Offsets of the router's logits (gpt-oss)."""
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    """softmax: experts compete for a token (Mixtral, DeepSeek-V2, Qwen). sigmoid: each
    is scored by itself (DeepSeek-V3, arXiv 2412.19437, eq. 15). sqrt_softplus: the same
    without an upper bound, √ln(1 + e^logit) (DeepSeek-V4)."""
    renormalise: bool = True
    """Divide a token's k weights by their sum (Mixtral, DeepSeek-V3); with softmax that
    is a softmax over the chosen logits alone (gpt-oss, Granite). Otherwise they are the
    scores themselves (DeepSeek-V2, OLMoE), small where scores are spread over many
    experts."""
    renormalise_eps: float = Field(default=1e-20, ge=0)
    """Term added to that sum (LFM2's is 1e-6)."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the weights after that; DeepSeek-V3 has 2.5."""
    expert_scales: bool = False
    """Multiply the weight of each routed expert by a learnt number of its own (Gemma
    4)."""
    router_norm_eps: float | None = Field(default=None, gt=0)
    """Route by x / √(mean(x²) + eps) times D learnt numbers over √D (Gemma 4); null: by
    x itself."""
    branch_norms: NormConfig | None = None
    """Norms of the routed experts' input and of their output, and the same of the
    shared experts': the layer then reads the residual stream without a norm before it,
    and so does the router (Gemma 4); null: there are none."""
    weigh_inputs: bool = False
    """Multiply an expert's input by its weight, in place of its output (Llama 4)."""
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
        check_gated(self.activation, self.gated)
        per_token = self.experts_per_token
        group_size = self.num_experts // self.groups
        if per_token > self.num_experts:
            raise MaxlmError(
                f"experts_per_token={per_token} of num_experts={self.num_experts}",
                fix="choose at most as many experts as there are",
            )
        if self.num_experts % self.groups:
            raise MaxlmError(
                f"num_experts={self.num_experts} is not a multiple of "
                f"groups={self.groups}",
                fix="make groups a divisor of num_experts",
            )
        if self.groups_per_token > self.groups:
            raise MaxlmError(
                f"groups_per_token={self.groups_per_token} of groups={self.groups}",
                fix="choose at most as many groups as there are",
            )
        if per_token > self.groups_per_token * group_size:
            raise MaxlmError(
                f"experts_per_token={per_token} cannot come from "
                f"groups_per_token={self.groups_per_token} groups of {group_size} experts",
                fix="raise groups_per_token, or lower experts_per_token or groups",
            )
        if self.group_score == "top2" and group_size < 2:
            raise MaxlmError(
                f"group_score=top2 with groups of {group_size} expert",
                fix="use group_score: max, or fewer groups",
            )
        if self.shared_experts == 0 and (self.shared_gate or self.shared_d_ff):
            raise MaxlmError(
                "shared_gate or shared_d_ff without shared experts",
                fix="set shared_experts to 1, or leave them out",
            )
        if self.branch_norms is not None and self.latent_dim is not None:
            raise MaxlmError(
                "branch_norms with latent_dim", fix="leave one of them out"
            )
        return self

    @property
    def normalizes_itself(self) -> bool:
        """Whether a layer has no norm before the feed-forward."""
        return self.branch_norms is not None

    def limit_experts(self, max_experts: int) -> Self:
        """Returns the config with at most so many experts (4 or more), of which a token
        meets half at most; a token that met some groups alone still does."""
        if self.num_experts <= max_experts:
            return self
        groups = min(self.groups, max_experts // 2)  # of two or more
        group_size = max_experts // groups
        num_experts = groups * group_size
        groups_per_token = max(1, groups * self.groups_per_token // self.groups)
        experts_per_token = min(
            self.experts_per_token, num_experts // 2, groups_per_token * group_size
        )
        return self.model_copy(
            update={
                "num_experts": num_experts,
                "experts_per_token": experts_per_token,
                "groups": groups,
                "groups_per_token": groups_per_token,
            }
        )


class MoeAux(NamedTuple):
    """Losses and statistics of a layer, fp32, the same on all devices."""

    loss: jax.Array
    """Scalar to add to a loss summed over tokens: balance and z losses times their
    coefficients and the number of tokens counted. A selection bias adds 0 to its value,
    and to its gradient the bias's; see ``Moe``."""
    load: jax.Array
    """[E]: assignments to each expert, dropped ones included."""
    dropped: jax.Array
    """Scalar: assignments that no expert had room for."""
    expert_ids: jax.Array
    """int32 [B, S, k]: each token's experts, those of padding included."""
    rerouted: jax.Array | None = None
    """Scalar: assignments to experts that routes name and the router itself would not
    have chosen; None: there are no routes."""


class Moe(nnx.Module):
    """``shared(x) + Σ_j weight_j · expert_j(x)`` over the k experts of each token.

    Parameters: ``router`` [D, E], ``gate`` and ``up`` [E, C, F], ``down`` [E, F, C],
    ``shared`` (an :class:`Mlp`), and ``selection_bias`` [E]; where the config asks for
    them ``router_bias`` [E], ``gate_bias`` and ``up_bias`` [E, F], ``down_bias`` [E,
    C], ``shared_gate`` [D, 1], ``router_scale`` [D], ``expert_scales`` [E], norms
    (``input_norm``, ``output_norm``, ``shared_norm``, ``shared_output_norm``), and the maps ``latent_down`` and ``latent_up`` between D
    and C.

    ``selection_bias`` learns by a rule: its gradient is load − mean load, whatever the
    losses are, and it is declared ``sign_update``: optimizers step against its sign by
    a fixed amount, which is algorithm 1 of arXiv 2408.15664. Since the load is that of
    all devices and gradients add up over micro-batches, the step does not depend on the
    layout.
    """

    name = "moe"

    def __init__(self, config: MoeConfig, context: BuildContext):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        d_model = context.d_model
        num_experts = config.num_experts
        input_dim = config.latent_dim or d_model
        up_shape = (num_experts, input_dim, config.d_ff)
        up_axes = ("expert", "expert_embed", "mlp")
        down_shape = (num_experts, config.d_ff, input_dim)
        down_axes = ("expert", "mlp", "expert_embed")
        normal = truncated_normal(context.init_std)
        residual_normal = truncated_normal(context.residual_std)

        # A "table" to optimizers: like an output head the router classifies tokens, and
        # is no map between hidden layers.
        self.router = declare(
            (d_model, num_experts),
            ("embed", None),
            normal,
            "table",
            contracting_dims=(0,),
        )
        self.gate = (
            declare(up_shape, up_axes, normal, "matrix", contracting_dims=(1,))
            if config.gated
            else None
        )
        self.up = declare(up_shape, up_axes, normal, "matrix", contracting_dims=(1,))
        self.down = declare(
            down_shape, down_axes, residual_normal, "matrix", contracting_dims=(1,)
        )
        self.router_bias = (
            self._declare_vector((num_experts,), (None,))
            if config.router_bias
            else None
        )
        hidden_shape = (num_experts, config.d_ff)
        hidden_axes = ("expert", "mlp")
        self.gate_bias = (
            self._declare_vector(hidden_shape, hidden_axes)
            if config.bias and config.gated
            else None
        )
        self.up_bias = (
            self._declare_vector(hidden_shape, hidden_axes) if config.bias else None
        )
        self.down_bias = (
            self._declare_vector((num_experts, input_dim), ("expert", "expert_embed"))
            if config.bias
            else None
        )
        residual = {"embed": d_model}
        latent = {"latent": input_dim}
        self.latent_down = (
            Linear(residual, latent, context, bias=config.bias)
            if config.latent_dim is not None
            else None
        )
        self.latent_up = (
            Linear(
                latent, residual, context, bias=config.bias, std=context.residual_std
            )
            if config.latent_dim is not None
            else None
        )
        self.selection_bias = (
            self._declare_vector((num_experts,), (None,), sign_update=True)
            if config.selection_bias
            else None
        )
        ones = jax.nn.initializers.ones
        self.router_scale = (
            declare((d_model,), (None,), ones, "vector")
            if config.router_norm_eps is not None
            else None
        )
        self.expert_scales = (
            declare((num_experts,), (None,), ones, "vector")
            if config.expert_scales
            else None
        )
        self.input_norm = self._build_norm(context)
        self.output_norm = self._build_norm(context)
        has_shared = config.shared_experts > 0
        self.shared = self._build_shared(context) if has_shared else None
        self.shared_norm = self._build_norm(context) if has_shared else None
        self.shared_output_norm = self._build_norm(context) if has_shared else None
        # Like the router it classifies tokens.
        self.shared_gate = (
            declare(
                (d_model, 1), ("embed", None), normal, "table", contracting_dims=(0,)
            )
            if config.shared_gate
            else None
        )

    def _build_norm(self, context: BuildContext) -> Norm | None:
        norm = self.config.branch_norms
        return None if norm is None else Norm(norm, context.d_model, context)

    def _declare_vector(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        sign_update: bool = False,
    ) -> nnx.Param:
        """Declares offsets that begin as zeros."""
        zeros = jax.nn.initializers.zeros
        return declare(shape, axes, zeros, "vector", sign_update=sign_update)

    def _build_shared(self, context: BuildContext) -> Mlp:
        """Builds the experts that serve every token, as one dense layer."""
        config = self.config
        mlp_config = MlpConfig(
            d_ff=config.shared_d_ff or config.shared_experts * config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
        )
        return Mlp(mlp_config, context)

    def feed(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        routes: jax.Array | None = None,
        *,
        record_routes: bool = False,
    ) -> tuple[jax.Array, Aux]:
        """See :class:`~maxlm.models.blocks.FeedForward`; ``routes``: int [B, S, k], as :func:`route` takes them."""
        mask = None
        if segment_ids is not None:
            token_layout = get_layout(x)[:2]
            mask = reshard(segment_ids != 0, make_spec(token_layout))
        y, moe_aux = self(x, mask, routes)
        load = moe_aux.load
        # An expert's assignments: mean, most and least, and the mean of those dropped.
        # The log divides the last three by the first, each added up over layers and
        # micro-batches (optim.step.convert_sums_to_metrics).
        sums = {
            "expert_load": load.mean(),
            "expert_load_max": load.max(),
            "expert_load_min": load.min(),
            "expert_dropped": moe_aux.dropped / load.size,
        }
        if moe_aux.rerouted is not None:
            sums["expert_rerouted"] = moe_aux.rerouted / load.size
        recorded = moe_aux.expert_ids if record_routes else None
        return y, Aux(moe_aux.loss, sums, recorded)

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        is_bounded = config.dispatch == "capacity"
        experts = ExpertRouting(
            router="router",
            experts_per_token=config.experts_per_token,
            num_experts=config.num_experts,
            capacity_factor=config.capacity_factor if is_bounded else None,
            has_shared=self.shared is not None,
            gates_shared=config.shared_gate,
            input_dim=config.latent_dim,
        )
        gate_flops = 0
        if self.shared_gate is not None:
            gate_flops = 2 * self.shared_gate.get_value().shape[-2]
        return LayerCosts(group_matrices(self), experts=experts, extra_flops=gate_flops)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, MoeAux]:
        """x [B, S, D] → the same in the compute dtype, and what there is to add to the
        loss and to log.

        Args:
            mask: bool [B, S], laid out as x; False for padding, which no routed expert
                serves and no statistic counts. None: all tokens.
            routes: int [B, S, k]: see :func:`route`.
        """
        config = self.config
        num_experts = config.num_experts
        x = x.astype(self.dtype)

        # Scores, and the experts they choose.
        logits = self._compute_logits(x)
        bias = None
        if self.selection_bias is not None:
            bias = read_weight(self.selection_bias, self.rules, logits.dtype).value
        if routes is not None:
            token_layout = get_layout(x)[:2]
            by_token = reshard(routes, make_spec((*token_layout, ())))
            routes = by_token.astype(jnp.int32)
        routing = route(logits, bias, config, routes)
        if mask is None:
            mask = jnp.ones_like(logits[..., 0], dtype=bool)
        # Padding goes to expert E, which is nowhere.
        expert_ids = jnp.where(mask[..., None], routing.expert_ids, num_experts)

        # Assignments to each expert, and those that a bounded one has no room for.
        experts = jnp.arange(num_experts)
        is_assigned = expert_ids[..., None] == experts  # [B, S, k, E]
        sequence_load = is_assigned.sum((1, 2), dtype=jnp.float32)  # [B, E]
        capacity = None
        dropped = jnp.zeros((), jnp.float32)
        if config.dispatch == "capacity":
            capacity = compute_expert_capacity(
                x.shape[1],
                config.experts_per_token,
                num_experts,
                config.capacity_factor,
            )
            dropped = jnp.maximum(sequence_load - capacity, 0).sum()
        load = sequence_load.sum(0)
        rerouted = None
        if routing.is_rerouted is not None:
            is_counted = routing.is_rerouted & mask[..., None]
            rerouted = is_counted.sum(dtype=jnp.float32)

        loss = router_loss(logits, routing.scores, load, mask, config)
        if bias is not None:
            # Adds 0 to the loss; the bias's gradient is the load beyond the mean.
            excess_load = lax.stop_gradient(load - load.mean())
            loss += jnp.sum(excess_load * (bias - lax.stop_gradient(bias)))

        weights = routing.weights
        if self.expert_scales is not None:
            scales = materialize(self.expert_scales, self.rules, weights.dtype)
            weights = weights * pick_by_number(scales, routing.expert_ids)
        inputs = _normalise(self.input_norm, x)
        y = self._apply_latent_experts(inputs, weights, expert_ids, capacity)
        y = _normalise(self.output_norm, y)
        if self.shared is not None:
            shared = self.shared(_normalise(self.shared_norm, x))
            shared = self._gate_shared(x, shared)
            y = y + _normalise(self.shared_output_norm, shared)
        return y, MoeAux(loss, load, dropped, routing.expert_ids, rerouted)

    def _compute_logits(self, x: jax.Array) -> jax.Array:
        """Returns the router's logits [B, S, E] in fp32 or wider."""
        logits = self._classify(self._scale_router_input(x), self.router)
        if self.router_bias is not None:
            logits += materialize(self.router_bias, self.rules, logits.dtype)
        return logits

    def _scale_router_input(self, x: jax.Array) -> jax.Array:
        """Normalises what the router reads, if the config says so, in fp32 or wider."""
        eps = self.config.router_norm_eps
        if self.router_scale is None or eps is None:
            return x
        wide = accumulation_dtype(self.dtype)
        scale = materialize(self.router_scale, self.rules, wide)

        def normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
            x = x.astype(wide)
            mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
            return x * lax.rsqrt(mean_square + eps) * (scale * x.shape[-1] ** -0.5)

        return save_inputs_only(normalise)(x, scale)

    def _gate_shared(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Multiplies the shared experts' output y [B, S, D] by their gate, if there is
        one."""
        if self.shared_gate is None:
            return y
        gate = jax.nn.sigmoid(self._classify(x, self.shared_gate))
        return y * gate.astype(y.dtype)

    def _classify(self, x: jax.Array, table: nnx.Param) -> jax.Array:
        """Multiplies x [B, S, D] by a table [D, classes] in fp32 or wider."""
        dtype = accumulation_dtype(self.dtype)
        return jnp.einsum(
            "bsd,de->bse",
            x.astype(dtype),
            materialize(table, self.rules, dtype),
            precision=lax.Precision.HIGHEST,  # a TPU multiplies fp32 in bf16 otherwise
            out_sharding=make_spec((*get_layout(x)[:2], ())),
        )

    def _apply_latent_experts(
        self,
        x: jax.Array,
        token_weights: jax.Array,
        expert_ids: jax.Array,
        capacity: int | None,
    ) -> jax.Array:
        """Returns what :meth:`_apply_experts` does, through the narrow vectors that
        latent experts read and write, if they are such."""
        if self.latent_down is None or self.latent_up is None:
            return self._apply_experts(x, token_weights, expert_ids, capacity)
        latent = self.latent_down(x, seq_axis="residual")
        token_layout = get_layout(latent)[:2]
        latent_axes = get_layout(latent)[2]
        # Experts read whole rows.
        latent = reshard(latent, make_spec((*token_layout, ())))
        y = self._apply_experts(latent, token_weights, expert_ids, capacity)
        y = reshard(y, make_spec((*token_layout, latent_axes)))
        return self.latent_up(y, seq_axis="residual")

    def _apply_experts(
        self,
        x: jax.Array,
        token_weights: jax.Array,
        expert_ids: jax.Array,
        capacity: int | None,
    ) -> jax.Array:
        """Returns the weighted sum [B, S, C] of the routed experts' outputs;
        ``capacity``: assignments of a sequence that an expert takes, None: all."""
        kernels = {}
        layouts = {}
        for name, param in self._expert_params().items():
            weight = read_weight(param, self.rules, self.dtype)
            kernels[name] = weight.value
            layouts[name] = weight.compute_layout
        return apply_experts(
            x,
            token_weights,
            expert_ids,
            kernels,
            activation=HiddenActivation(self.config.activation),
            kernel_layouts=layouts,
            expert_capacity=capacity,
            weigh_inputs=self.config.weigh_inputs,
        )

    def _expert_params(self) -> dict[str, nnx.Param]:
        """Returns the routed experts' parameters, by their names in
        ``parallel/experts.py``."""
        params = {
            "gate": self.gate,
            "up": self.up,
            "down": self.down,
            "gate_bias": self.gate_bias,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
        }
        return {name: param for name, param in params.items() if param is not None}


def _normalise(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def pick_by_number(values: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns the values [E] at numbers int [B, S, k], as [B, S, k]; not by a gather,
    whose gradient would be a scatter."""
    one_hot = numbers[..., None] == jnp.arange(values.shape[0])
    return jnp.where(one_hot, values, 0).sum(-1)


class Routing(NamedTuple):
    """Each token's experts, chosen by :func:`route`."""

    scores: jax.Array
    """fp32 [B, S, E], of every expert."""
    weights: jax.Array
    """fp32 [B, S, k], of the experts chosen."""
    expert_ids: jax.Array
    """int32 [B, S, k], best first, ties to the lower number; or as routes have them."""
    is_rerouted: jax.Array | None = None
    """bool [B, S, k]: whether the scores alone would have chosen other experts than
    this one; None: there are no routes."""


def route(
    logits: jax.Array,
    bias: jax.Array | None,
    config: MoeConfig,
    routes: jax.Array | None = None,
) -> Routing:
    """Chooses each token's experts and their weights. Differentiable in the logits
    through scores and weights, also of experts that routes name; not in the bias.

    Args:
        logits: fp32 [B, S, E].
        bias: fp32 [E], added to the scores that experts and groups are chosen by.
        routes: int32 [B, S, k]: the experts of each token, such as an engine has chosen
            (router replay: arXiv 2510.11370); -1: the token has none, and its
            scores choose.
    """
    scores = _compute_scores(logits, config)
    # What experts are chosen by; the choice has no gradient.
    if bias is not None:
        ranking = scores + bias
    elif config.score == "softmax" or config.group_score == "top2":
        ranking = scores
    else:
        ranking = logits  # in the same order, also where sigmoids are 1
    ranking = lax.stop_gradient(ranking)
    if config.groups_per_token < config.groups:
        group_size = config.num_experts // config.groups
        # [B, S, groups, experts of a group]
        by_group = ranking.reshape(*ranking.shape[:-1], config.groups, group_size)
        num_best = 1 if config.group_score == "max" else 2
        best_scores, _ = lax.top_k(by_group, num_best)
        group_scores = best_scores.sum(-1)
        _, chosen_groups = lax.top_k(group_scores, config.groups_per_token)
        is_chosen = (chosen_groups[..., None] == jnp.arange(config.groups)).any(-2)
        is_allowed = jnp.repeat(is_chosen, group_size, axis=-1)  # [B, S, E]
        ranking = jnp.where(is_allowed, ranking, -jnp.inf)
    _, expert_ids = lax.top_k(ranking, config.experts_per_token)
    is_rerouted = None
    if routes is not None:
        is_own = (routes[..., None] == expert_ids[..., None, :]).any(-1)
        is_rerouted = (routes >= 0) & ~is_own
        expert_ids = jnp.where(routes >= 0, routes, expert_ids)
    # Not take_along_axis: its gradient would be a scatter into [B, S, E].
    one_hot = expert_ids[..., None] == jnp.arange(config.num_experts)
    weights = jnp.where(one_hot, scores[..., None, :], 0.0).sum(-1)
    if config.renormalise:
        # The sum of sigmoids can underflow to 0.
        weights_sum = weights.sum(-1, keepdims=True)
        weights = weights / (weights_sum + config.renormalise_eps)
    return Routing(scores, weights * config.scale, expert_ids, is_rerouted)


def _compute_scores(logits: jax.Array, config: MoeConfig) -> jax.Array:
    """Returns each expert's score, of any shape [..., E], as ``MoeConfig.score`` says."""
    if config.score == "softmax":
        return jax.nn.softmax(logits)
    if config.score == "sigmoid":
        return jax.nn.sigmoid(logits)
    # Where the softplus underflows to 0 its root has no slope.
    return jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, -80.0)))


def router_loss(
    logits: jax.Array,
    scores: jax.Array,
    load: jax.Array,
    mask: jax.Array,
    config: MoeConfig,
) -> jax.Array:
    """Computes balance and z losses times coefficients and counted tokens, an fp32
    scalar. ``MoeConfig.balance_loss`` and ``z_loss`` have the formulas.

    Args:
        logits, scores: fp32 [B, S, E].
        load: fp32 [E], assignments to each expert.
        mask: bool [B, S], the tokens counted.
    """
    loss = jnp.zeros((), jnp.float32)
    if config.balance_loss:
        shares = scores
        if config.score != "softmax":  # DeepSeek-V3, eq. 19
            shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        share_sums = jnp.where(mask[..., None], shares, 0.0).sum((0, 1))
        num_tokens = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
        # Shares of assignments and mean shares of scores, [E]: f and P of Switch's
        # formula.
        f = lax.stop_gradient(load) / (num_tokens * config.experts_per_token)
        p = share_sums / num_tokens
        loss += config.balance_loss * num_tokens * config.num_experts * jnp.sum(f * p)
    if config.z_loss:
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        loss += config.z_loss * jnp.where(mask, squares, 0.0).sum()
    return loss
