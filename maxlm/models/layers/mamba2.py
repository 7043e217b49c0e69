"""Mamba-2: a state space whose decay is one number a head (Dao & Gu 2024, arXiv
2405.21060, §7), computed in chunks.

Shapes: B batch, S sequence, D model, N heads, P head dim, G groups of heads, K state
size, W width of the convolution; in inference R rows, n of them side by side, T tokens
of each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import (
    CacheArraySpec,
    CacheLayout,
    RecurrentCache,
    SplitArray,
)
from maxlm.models.caches.layout import as_array
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mamba import spread_step_sizes, uniform
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.recurrence_costs import count_kernel_elements
from maxlm.models.params import Initializer, declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.causal_conv import convolve_features, sharded_causal_conv
from maxlm.parallel.linear_recurrence import sharded_linear_recurrence, spread_groups
from pallas_kernels.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_step,
)

BLOCK_TOKENS = 512
"""Tokens between states that the backward pass keeps."""
CHUNK = 64
"""Tokens of a chunk, whose scores are one product."""


class ProjectionScales(Config):
    """Factors on what the input is mapped to (µP; Falcon-H1, arXiv 2507.22448)."""

    gate: float = 1.0
    value: float = 1.0
    key: float = 1.0
    query: float = 1.0
    step: float = 1.0


class Mamba2Config(Config):
    """A state space of matrices, one a head."""

    kind: Literal["mamba2"] = "mamba2"

    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    """Channels of a head; heads times channels are usually twice d_model."""
    state_size: int = Field(gt=0)
    """Numbers of state that a channel has."""
    num_groups: int = Field(default=1, gt=0)
    """Groups of heads that share what is written to their states and read from them
    (B and C), as kv heads are shared."""
    conv_width: int = Field(default=4, gt=0)
    """Tokens that the convolution in front of the recurrence sees."""
    conv_bias: bool = True
    """Offsets of the convolution."""
    bias: bool = False
    """Offsets on the projections of the input."""
    out_bias: bool | None = None
    """Offsets on the projection back; null: as ``bias``."""
    gated_norm: Literal["gate_first", "norm_first", "none"] = "gate_first"
    """How outputs y, normalised, are gated: norm(y · silu(gate)) as published, norm(y) ·
    silu(gate), or y · silu(gate) without a norm."""
    norm_groups: int | None = Field(default=None, gt=0)
    """Groups of heads that are normalised apart; null: num_groups."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Of that norm; null: the model's."""
    min_step: float = Field(default=0.0, ge=0)
    """Time steps are cut off below this."""
    max_step: float | None = Field(default=None, gt=0)
    """Time steps are cut off above this; null: they are not."""
    initial_steps: tuple[float, float] = (1e-3, 1e-1)
    """Range of the heads' time steps before training, even in their logarithm."""
    initial_decay: tuple[float, float] = (1.0, 16.0)
    """Range of the heads' decay rates before training."""
    input_scale: float = Field(default=1.0, gt=0)
    """Factor on the input."""
    projection_scales: ProjectionScales | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        num_heads = self.num_heads
        groups = {"num_groups": self.num_groups, "norm_groups": self.norm_groups or 1}
        for name, number in groups.items():
            if num_heads % number:
                raise MaxlmError(
                    f"num_heads={num_heads} is not a multiple of {name}={number}",
                    fix="let every group have as many heads as the others",
                )
        if self.max_step is not None and self.max_step < self.min_step:
            raise MaxlmError(
                f"max_step={self.max_step} below min_step={self.min_step}",
                fix="raise it, or set it to null",
            )
        for name in ("initial_steps", "initial_decay"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise MaxlmError(
                    f"{name}=[{low}, {high}]", fix="give two positive numbers, in order"
                )
        return self

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns a state space of the same kind with small heads: two a group, in at
        most two groups."""
        num_groups = min(self.num_groups, 2)
        norm_groups = self.norm_groups
        if norm_groups is not None:
            norm_groups = min(norm_groups, 2)
        return self.model_copy(
            update={
                "num_heads": 2 * num_groups,
                "head_dim": head_dim,
                "state_size": min(self.state_size, head_dim),
                "num_groups": num_groups,
                "norm_groups": norm_groups,
            }
        )


class TokenStates(NamedTuple):
    """What earlier tokens of n rows leave behind."""

    value_inputs: jax.Array
    """[n, W − 1, N·P], the last inputs of the values' convolution."""
    key_inputs: jax.Array
    """[n, W − 1, G·K]."""
    query_inputs: jax.Array
    """[n, W − 1, G·K]."""
    state: jax.Array
    """fp32 [n, N, K, P]."""


class RecurrenceInputs(NamedTuple):
    """What tokens are mapped to, in the order of :class:`RecurrenceParams`."""

    value: jax.Array
    """[n, T, N, P]; x in the paper."""
    key: jax.Array
    """[n, T, G, K]; B in the paper."""
    query: jax.Array
    """[n, T, G, K]; C in the paper."""
    step: jax.Array
    """[n, T, N]: time steps before their offset and softplus."""


class RecurrenceParams(NamedTuple):
    """Parameters of the recurrence, fp32."""

    value_conv: jax.Array
    """[N, P, W], the current token's last."""
    key_conv: jax.Array
    """[G, K, W]."""
    query_conv: jax.Array
    """[G, K, W]."""
    value_offset: jax.Array
    """[N, P], of the convolution."""
    key_offset: jax.Array
    """[G, K]."""
    query_offset: jax.Array
    """[G, K]."""
    dt_bias: jax.Array
    """[N], of time steps."""
    A_log: jax.Array
    """[N]: logarithms of decay rates."""
    D: jax.Array
    """[N]: shares of values that are added to outputs."""


def discretize(
    value: jax.Array,
    dt: jax.Array,
    dt_bias: jax.Array,
    A_log: jax.Array,
    step_limits: tuple[float, float | None],
) -> tuple[jax.Array, jax.Array]:
    """Computes Δ = softplus(dt + dt_bias), cut off at the limits, in fp32: returns what
    is written, Δ·value [..., N, P] in value's dtype, and log decays −Δ·exp(A_log) [...,
    N], fp32."""
    step = jax.nn.softplus(dt.astype(dt_bias.dtype) + dt_bias)
    step = jnp.clip(step, *step_limits)
    written = (value.astype(step.dtype) * step[..., None]).astype(value.dtype)
    return written, -step * jnp.exp(A_log)


def add_skip(y: jax.Array, value: jax.Array, D: jax.Array) -> jax.Array:
    """Returns y + D·value, [..., N, P] in value's dtype."""
    skipped = D[:, None] * value.astype(D.dtype)
    return (y.astype(D.dtype) + skipped).astype(value.dtype)


def advance_tokens(
    states: TokenStates,
    inputs: RecurrenceInputs,
    params: RecurrenceParams,
    live: jax.Array,
    step_limits: tuple[float, float | None],
) -> tuple[TokenStates, jax.Array]:
    """Runs tokens of n rows from what those before left, on one device: ``S ←
    exp(−Δ·exp(A_log))·S + Δ·key·valueᵀ``, ``y = Sᵀ·query + D·value``.

    Args:
        live: bool [n, T]; tokens that are not live are the last of a row, and leave
            states as they are.
        step_limits: the smallest and largest Δ; None: there is none.

    Returns:
        The states after the tokens, and y [n, T, N, P] in the dtype of values.
    """
    convolve = partial(convolve_features, live=live, activation="silu")
    value, value_inputs = convolve(
        inputs.value, params.value_conv, params.value_offset, states.value_inputs
    )
    key, key_inputs = convolve(
        inputs.key, params.key_conv, params.key_offset, states.key_inputs
    )
    query, query_inputs = convolve(
        inputs.query, params.query_conv, params.query_offset, states.query_inputs
    )
    written, log_decay = discretize(
        value, inputs.step, params.dt_bias, params.A_log, step_limits
    )
    if written.shape[1] == 1:
        y, state = linear_recurrence_step(
            query[:, 0],
            key[:, 0],
            written[:, 0],
            log_decay[:, 0],
            state=states.state,
            token_mask=live[:, 0],
        )
        y = y[:, None]
    else:
        y, state = linear_recurrence(
            query,
            key,
            written,
            log_decay,
            initial_state=states.state,
            token_mask=live,
            chunk_size=CHUNK,
        )
    new_states = TokenStates(value_inputs, key_inputs, query_inputs, state)
    return new_states, add_skip(y, value, params.D)


class Mamba2(nnx.Module):
    """``out(gated_norm(space(x), gate(x)))`` (Dao & Gu 2024, arXiv 2405.21060, §7.1,
    Fig. 6 right).

    Parameters: maps of the input to ``gate`` and ``value`` [D, N, P], ``key`` and
    ``query`` [D, G, K], ``step`` [D, N], and ``out`` [N, P, D]; convolutions
    ``value_conv`` [N, P, W], ``key_conv`` and ``query_conv`` [G, K, W] with offsets
    ``value_conv_bias`` and so on; ``dt_bias``, ``A_log`` and ``D`` [N];
    ``norm_scale`` [N, P].
    """

    name = "mamba2"
    joint_projections = (("gate", "value", "key", "query", "step"),)
    """See :class:`~maxlm.models.layers.attention.Attention`."""

    def __init__(self, config: Mamba2Config, norm: NormConfig, context: BuildContext):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.balance_sequence = context.parallel.balance_sequence
        self.norm_eps = config.norm_eps or norm.eps
        num_heads = config.num_heads
        # Groups lie with their heads; one alone is whole wherever there are heads.
        self.group_axis = "heads" if config.num_groups > 1 else "state"
        residual = {"embed": context.d_model}
        channels = {"heads": num_heads, "head_dim": config.head_dim}
        groups = {self.group_axis: config.num_groups, "head_dim": config.state_size}
        heads = {"heads": num_heads}
        bias = config.bias
        self.gate = Linear(residual, channels, context, bias=bias)
        self.value = Linear(residual, channels, context, bias=bias)
        self.key = Linear(residual, groups, context, bias=bias)
        self.query = Linear(residual, groups, context, bias=bias)
        self.step = Linear(residual, heads, context, bias=bias)
        self.out = Linear(
            channels,
            residual,
            context,
            bias=config.has_out_bias,
            std=context.residual_std,
        )

        value_shape = (num_heads, config.head_dim)
        group_shape = (config.num_groups, config.state_size)
        group_axes = (self.group_axis, "head_dim")
        self.value_conv = _declare_conv(value_shape, _VALUE_AXES, config)
        self.key_conv = _declare_conv(group_shape, group_axes, config)
        self.query_conv = _declare_conv(group_shape, group_axes, config)
        self.value_conv_bias = _declare_conv_bias(value_shape, _VALUE_AXES, config)
        self.key_conv_bias = _declare_conv_bias(group_shape, group_axes, config)
        self.query_conv_bias = _declare_conv_bias(group_shape, group_axes, config)
        self.dt_bias = declare(
            (num_heads,), ("heads",), spread_step_sizes(*config.initial_steps), "vector"
        )
        self.A_log = declare(
            (num_heads,), ("heads",), _draw_log_uniform(config.initial_decay), "vector"
        )
        ones = jax.nn.initializers.ones
        self.D = declare((num_heads,), ("heads",), ones, "vector")
        has_norm = config.gated_norm != "none"
        self.norm_scale = (
            declare(value_shape, _VALUE_AXES, ones, "vector") if has_norm else None
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: RecurrentCache | None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        if self.config.input_scale != 1:
            x = x * jnp.asarray(self.config.input_scale, x.dtype)
        products = project(x, self.gate, self.value, self.key, self.query, self.step)
        # A name that remat policies keep (models/remat.py).
        products = [checkpoint_name(product, "qkv") for product in products]
        gate, *mapped = self._scale(products)
        y, cache = self._mix(RecurrenceInputs(*mapped), inputs, cache)
        scale = None
        if self.norm_scale is not None:
            wide = accumulation_dtype(self.dtype)
            scale = materialize(self.norm_scale, self.rules, wide)
        y = save_inputs_only(self._gate_and_norm)(y, gate, scale)
        return MixerOutput(self.out(y, seq_axis="residual"), cache)

    def _scale(self, products: Sequence[jax.Array]) -> list[jax.Array]:
        scales = self.config.projection_scales
        if scales is None:
            return list(products)
        factors = (scales.gate, scales.value, scales.key, scales.query, scales.step)
        return [
            product * jnp.asarray(factor, product.dtype)
            for product, factor in zip(products, factors, strict=True)
        ]

    def _mix(
        self,
        mapped: RecurrenceInputs,
        inputs: AttentionInputs,
        cache: RecurrentCache | None,
    ) -> tuple[jax.Array, RecurrentCache | None]:
        limits = (self.config.min_step, self.config.max_step)
        params = self._read_params()
        group_axes = (self.group_axis, "head_dim")
        token_axes = (_VALUE_AXES, group_axes, group_axes, ("heads",))
        tokens = [
            SplitArray(x, axes) for x, axes in zip(mapped, token_axes, strict=True)
        ]
        if cache is None:
            return self._run(tokens, params, inputs, limits), None

        def advance(
            states: TokenStates,
            tokens: tuple[jax.Array, ...],
            live: jax.Array,
            *params: jax.Array,
        ) -> tuple[TokenStates, jax.Array]:
            mapped = RecurrenceInputs(*tokens)
            recurrence = RecurrenceParams(*params)
            return advance_tokens(states, mapped, recurrence, live, limits)

        assert inputs.batch is not None
        convs = (_VALUE_AXES, group_axes, group_axes)
        param_axes = (*((*axes, None) for axes in convs), *convs, *(("heads",),) * 3)
        return cache.run(
            advance,
            tokens,
            inputs.batch,
            self.rules,
            params=[
                SplitArray(x, axes) for x, axes in zip(params, param_axes, strict=True)
            ],
            output_axes=_VALUE_AXES,
        )

    def _run(
        self,
        tokens: Sequence[SplitArray],
        params: RecurrenceParams,
        inputs: AttentionInputs,
        step_limits: tuple[float, float | None],
    ) -> jax.Array:
        """Runs whole rows, [B, S, ...] → [B, S, N, P]."""
        *convolved, step = tokens
        convolve = partial(
            sharded_causal_conv,
            activation="silu",
            rules=self.rules,
            segment_ids=inputs.segment_ids,
            balanced=self.balance_sequence,
        )
        value_input, key_input, query_input = convolved
        value = convolve(value_input, params.value_conv, params.value_offset)
        key = convolve(key_input, params.key_conv, params.key_offset)
        query = convolve(query_input, params.query_conv, params.query_offset)
        written, log_decay = save_inputs_only(
            partial(discretize, step_limits=step_limits)
        )(value, step.value, params.dt_bias, params.A_log)
        if self.group_axis != "heads":
            key = spread_groups(key, self.config.num_heads, self.rules)
            query = spread_groups(query, self.config.num_heads, self.rules)
        y = sharded_linear_recurrence(
            query,
            key,
            written,
            log_decay,
            chunk_size=CHUNK,
            rules=self.rules,
            segment_ids=inputs.segment_ids,
            balanced=self.balance_sequence,
        )
        return save_inputs_only(add_skip)(y, value, params.D)

    def _read_params(self) -> RecurrenceParams:
        wide = accumulation_dtype(self.dtype)

        def read(param: nnx.Param) -> jax.Array:
            return materialize(param, self.rules, wide)

        convs = [read(self.value_conv), read(self.key_conv), read(self.query_conv)]
        biases = (self.value_conv_bias, self.key_conv_bias, self.query_conv_bias)
        offsets = [
            jnp.zeros_like(conv[..., 0]) if bias is None else read(bias)
            for conv, bias in zip(convs, biases, strict=True)
        ]
        by_head = [read(self.dt_bias), read(self.A_log), read(self.D)]
        return RecurrenceParams(*convs, *offsets, *by_head)

    def _gate_and_norm(
        self, y: jax.Array, gate: jax.Array, scale: jax.Array | None
    ) -> jax.Array:
        """y and gate [B, S, N, P], scale [N, P] → [B, S, N, P]; in fp32."""
        wide = accumulation_dtype(self.dtype)
        y = y.astype(wide)
        gate = jax.nn.silu(gate.astype(wide))
        if scale is None:
            return (y * gate).astype(self.dtype)
        if self.config.gated_norm == "gate_first":
            return self._normalise(y * gate, scale).astype(self.dtype)
        return (self._normalise(y, scale) * gate).astype(self.dtype)

    def _normalise(self, y: jax.Array, scale: jax.Array) -> jax.Array:
        """RMSNorm over the heads of each group."""
        num_groups = self.config.norm_groups or self.config.num_groups
        if num_groups == 1:
            square = jnp.mean(jnp.square(y), axis=(2, 3), keepdims=True)
            return y * jax.lax.rsqrt(square + self.norm_eps) * scale
        *tokens, num_heads, head_dim = y.shape
        shape = (*tokens, num_groups, num_heads // num_groups, head_dim)
        grouped = y.reshape(shape)
        square = jnp.mean(jnp.square(grouped), axis=(3, 4), keepdims=True)
        return (grouped * jax.lax.rsqrt(square + self.norm_eps)).reshape(
            y.shape
        ) * scale

    def cache_spec(self, layout: CacheLayout, window: int | None) -> RecurrentCache:
        """A layer's cache: the last inputs of its convolution, and its state."""
        config = self.config
        rows = (layout.num_shards, layout.num_rows)
        row_axes = ("batch", None)
        slots = config.conv_width - 1
        channels = config.num_heads * config.head_dim
        group_width = config.num_groups * config.state_size
        values = CacheArraySpec((*rows, slots, channels), (*row_axes, None, "heads"))
        keys = CacheArraySpec(
            (*rows, slots, group_width), (*row_axes, None, self.group_axis)
        )
        state = CacheArraySpec(
            (*rows, config.num_heads, config.state_size, config.head_dim),
            (*row_axes, "heads", None, None),
            accumulation_dtype(self.dtype),
        )
        arrays = (as_array(spec) for spec in (values, keys, keys, state))
        return RecurrentCache(TokenStates(*arrays))

    def costs(self) -> LayerCosts:
        """See :mod:`maxlm.models.costs`. A token of a head is multiplied with the state
        twice, and with a chunk's keys and values, of which a mask leaves half."""
        config = self.config
        projections = tuple(f"{name}.kernel" for name in self.joint_projections[0])
        matrices = (MatrixGroup(projections), MatrixGroup(("out.kernel",), "heads"))
        channels = config.num_heads * config.head_dim
        group_width = config.num_groups * config.state_size
        state_flops = 4 * channels * config.state_size
        chunk_flops = 2 * CHUNK * (group_width + channels)
        conv_flops = 2 * config.conv_width * (channels + 2 * group_width)
        num_heads = config.num_heads
        states = channels * config.state_size
        fp32_share = 4 / jnp.dtype(self.dtype).itemsize
        # One group of keys and queries is whole on every device, and so is the mean of
        # a norm over all heads.
        has_shared_groups = self.group_axis != "heads"
        num_norm_groups = config.norm_groups or config.num_groups
        has_joint_norm = config.gated_norm != "none" and num_norm_groups == 1
        return LayerCosts(
            matrices,
            extra_flops=state_flops + chunk_flops + conv_flops,
            product_flops=state_flops + chunk_flops,
            flops_axes=("heads",),
            shared_elements=2 * group_width if has_shared_groups else 0,
            # A run's decay a head, and the state behind it.
            exchanged_elements=num_heads + states,
            halo_elements=(channels + 2 * group_width) * (config.conv_width - 1),
            reduced_elements=1 if has_joint_norm else 0,
            saved_elements=channels,
            state_elements=states,
            state_tokens=BLOCK_TOKENS,
            # Convolutions' outputs, written values, decays in fp32, outputs with their
            # skip and behind gate and norm.
            intermediate_elements=4 * channels
            + 2 * group_width
            + num_heads * fp32_share,
            # Of a block in fp32: its operands, two matrices of each chunk with itself,
            # the state at each chunk, and what is made of these; with their gradients.
            block_elements=2
            * (num_heads * 2 * CHUNK + 4 * channels + 2 * group_width + states / CHUNK),
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=CHUNK,
            kernel_elements=count_kernel_elements(
                num_heads,
                config.num_groups,
                config.state_size,
                config.head_dim,
                self.dtype,
            ),
        )


_VALUE_AXES = ("heads", "head_dim")


def _declare_conv(
    shape: tuple[int, int], axes: tuple[str, str], config: Mamba2Config
) -> nnx.Param:
    # As torch's Conv1d begins, which the published code leaves as it is.
    init = uniform(config.conv_width**-0.5)
    return declare((*shape, config.conv_width), (*axes, None), init, "table")


def _declare_conv_bias(
    shape: tuple[int, int], axes: tuple[str, str], config: Mamba2Config
) -> nnx.Param | None:
    if not config.conv_bias:
        return None
    return declare(shape, axes, jax.nn.initializers.zeros, "vector")


def _draw_log_uniform(bounds: tuple[float, float]) -> Initializer:
    """Draws logarithms of numbers that are even between the bounds."""
    low, high = bounds

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return draw
