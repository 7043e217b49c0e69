"""Mamba's mixer (Gu & Dao 2023, arXiv 2312.00752): a short convolution, and a scan whose
steps and reads each token chooses by itself.

Shapes: B batch, S sequence, D model, F inner channels, N numbers of state a channel, R
rank of the step sizes, W width of the convolution.
"""

import math
from dataclasses import replace
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
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import AttentionInputs
from maxlm.models.layers.channel_conv import (
    convolve_channels,
    convolve_channels_cached,
)
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import Initializer, declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.selective_scan import (
    SelectiveScanInputs,
    sharded_selective_scan,
)
from pallas_kernels.selective_scan import CHUNK_TOKENS, selective_scan


class MambaConfig(Config):
    """Sizes of Mamba's mixer, and how its steps begin."""

    kind: Literal["mamba"] = "mamba"

    d_inner: int = Field(gt=0)
    """Inner channels; published models have twice the model's width."""
    d_state: int = Field(default=16, gt=0)
    """Numbers of state a channel, each with a decay of its own."""
    d_conv: int = Field(default=4, gt=1)
    """Tokens that the convolution sees: a token and those before it."""
    dt_rank: int = Field(gt=0)
    """Width that step sizes are squeezed through; published models have a sixteenth of
    the model's width."""
    bias: bool = False
    """Offsets on the projections into and out of the inner channels."""
    conv_bias: bool = True
    """Offsets on the convolution."""
    inner_norms: Literal["none", "weightless", "learned"] = "none"
    """RMSNorm of what step sizes, B and C are made of: without weights (Falcon-Mamba)
    or with (Jamba)."""
    inner_norm_eps: float | None = Field(default=None, gt=0)
    """Their eps; null: the model's."""
    dt_min: float = Field(default=1e-3, gt=0)
    """Smallest step size of a channel at the beginning; they are spread evenly in
    logarithm (arXiv 2312.00752, §3.6)."""
    dt_max: float = Field(default=0.1, gt=0)
    """Largest step size of a channel at the beginning."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.dt_min > self.dt_max:
            raise MaxlmError(
                f"dt_min={self.dt_min} above dt_max={self.dt_max}",
                fix="exchange them",
            )
        return self

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns a mixer of the same kind that is four heads wide, for a smoke
        test."""
        del seq_len
        return self.model_copy(
            update={"d_inner": 4 * head_dim, "dt_rank": max(1, head_dim // 4)}
        )


class MambaCache(NamedTuple):
    """What a layer keeps of the tokens before."""

    conv: RecurrentCache
    """Inputs of the convolution, [D, rows, W − 1, F] in the compute dtype."""
    scan: RecurrentCache
    """States, fp32 [D, rows, N, F]: channels last, since a TPU pads last dimensions to
    128."""


class Mamba(nnx.Module):
    """``out(scan(silu(conv(input(x)))) · silu(gate(x)))``; convolution and scan begin
    anew with each document.

    Parameters: ``input`` and ``gate`` [D, F] and ``out`` [F, D]; ``conv_weight`` [F, W]
    and ``conv_bias`` [F]; ``x_proj`` [F, R + 2·N], which makes the vectors that step
    sizes are made of, B and C; ``dt_proj`` [R, F] and ``dt_bias`` [F]; ``A_log`` [F,
    N]; ``D`` [F].
    """

    name = "mamba"
    joint_projections = (("input", "gate"),)

    def __init__(self, config: MambaConfig, norm: NormConfig, context: BuildContext):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.balance_sequence = context.parallel.balance_sequence
        residual = {"embed": context.d_model}
        channels = {"mlp": config.d_inner}
        self.input = Linear(residual, channels, context, bias=config.bias)
        self.gate = Linear(residual, channels, context, bias=config.bias)

        # As PyTorch begins a convolution, whose published models do not say otherwise.
        conv_init = uniform(config.d_conv**-0.5)
        conv_shape = config.d_inner, config.d_conv
        self.conv_weight = declare(conv_shape, ("mlp", None), conv_init, "table")
        conv_bias = None
        if config.conv_bias:
            conv_bias = declare(conv_shape[:1], ("mlp",), conv_init, "vector")
        self.conv_bias = conv_bias

        # All channels make one narrow vector, which is whole on every device.
        whole_latents = context.rules.model_copy(update={"latent": ()})
        self.x_proj = Linear(
            channels,
            {"latent": config.dt_rank + 2 * config.d_state},
            replace(context, rules=whole_latents),
            bias=False,
        )
        self.dt_proj = Linear(
            {None: config.dt_rank},
            channels,
            context,
            bias=False,
            initializer=uniform(config.dt_rank**-0.5),
        )
        vector = (config.d_inner,)
        self.dt_bias = declare(
            vector,
            ("mlp",),
            spread_step_sizes(config.dt_min, config.dt_max),
            "vector",
        )
        # −exp(A_log) = −1, −2, … −N in every channel (S4D-Real, arXiv 2206.11893, §4).
        self.A_log = declare(
            (config.d_inner, config.d_state), ("mlp", None), count_in_logs, "vector"
        )
        self.D = declare(vector, ("mlp",), jax.nn.initializers.ones, "vector")
        self.out = Linear(
            channels, residual, context, bias=config.bias, std=context.residual_std
        )

        eps = config.inner_norm_eps or norm.eps
        self.inner_norm_eps = eps
        inner_norm = NormConfig(kind="rmsnorm", eps=eps)

        def build_norm(size: int) -> Norm | None:
            if config.inner_norms != "learned":
                return None
            return Norm(inner_norm, size, context)

        self.dt_norm = build_norm(config.dt_rank)
        self.B_norm = build_norm(config.d_state)
        self.C_norm = build_norm(config.d_state)

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: MambaCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        x, gate = project(x, self.input, self.gate)
        # A name that remat policies keep (models/remat.py).
        x = checkpoint_name(x, "qkv")
        gate = checkpoint_name(gate, "qkv")

        weight, bias = self._read_conv()
        if cache is None:
            x = convolve_channels(
                x,
                weight,
                bias,
                inputs,
                rules=self.rules,
                balanced=self.balance_sequence,
                activation="silu",
            )
            y = sharded_selective_scan(
                self._select(x),
                rules=self.rules,
                feature_axis="mlp",
                segment_ids=inputs.segment_ids,
                balanced=self.balance_sequence,
            )
        else:
            x, conv_cache = convolve_channels_cached(
                x,
                weight,
                bias,
                inputs,
                cache.conv,
                rules=self.rules,
                activation="silu",
            )
            y, scan_cache = self._scan_cached(self._select(x), inputs, cache.scan)
            cache = MambaCache(conv_cache, scan_cache)
        y = save_inputs_only(lambda y, gate: y * jax.nn.silu(gate))(y, gate)
        return MixerOutput(self.out(y, seq_axis="residual"), cache)

    def cache_spec(self, layout: CacheLayout, window: int | None) -> MambaCache:
        """A layer's cache; see :mod:`maxlm.models.caches`."""
        del window
        config = self.config
        rows = layout.num_shards, layout.num_rows
        axes = ("batch", None, None, "mlp")
        inputs = CacheArraySpec((*rows, config.d_conv - 1, config.d_inner), axes)
        states = CacheArraySpec(
            (*rows, config.d_state, config.d_inner),
            axes,
            accumulation_dtype(self.dtype),
        )
        return MambaCache(RecurrentCache(inputs), RecurrentCache(states))

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`."""
        config = self.config
        # Of a number of state: dt · A, exp, decay · h, drive · B, their sum, C · h, sum
        # over N. Of a channel: dt · x, D · x, sum; the convolution; the gate.
        per_state = 7
        per_channel = 3 + 2 * config.d_conv + 1
        flops = config.d_inner * (per_state * config.d_state + per_channel)
        maps = ("input.kernel", "gate.kernel")
        return LayerCosts(
            (
                MatrixGroup(maps, kept_products=maps),
                MatrixGroup(("x_proj.kernel",), "mlp"),
                MatrixGroup(("dt_proj.kernel",), "latent"),
                MatrixGroup(("out.kernel",), "mlp"),
            ),
            extra_flops=flops,
            flops_axes=("mlp",),
            # B and C.
            shared_elements=2 * config.d_state,
            # Decay and offset of each number of state.
            exchanged_elements=2 * config.d_inner * config.d_state,
            halo_elements=config.d_inner * (config.d_conv - 1),
            saved_elements=config.d_inner,
            state_elements=config.d_inner * config.d_state,
            state_tokens=CHUNK_TOKENS,
            # The convolution's output, step sizes, and the output behind its gate.
            intermediate_elements=3 * config.d_inner,
            # Inputs, step sizes and their gradients, in fp32 or cut into chunks; and
            # about as many states within a chunk as between chunks.
            working_elements=3 * config.d_inner
            + config.d_inner * config.d_state / CHUNK_TOKENS,
        )

    def _read_conv(self) -> tuple[jax.Array, jax.Array | None]:
        weight = materialize(self.conv_weight, self.rules, self.dtype)
        bias = None
        if self.conv_bias is not None:
            bias = materialize(self.conv_bias, self.rules, self.dtype)
        return weight, bias

    def _select(self, x: jax.Array) -> SelectiveScanInputs:
        """Returns the scan's arguments, chosen by the convolution's output x [B, S,
        F]."""
        latents = self.x_proj(x)
        rank = self.config.dt_rank
        num_states = self.config.d_state
        dt, B, C = jnp.split(latents, (rank, rank + num_states), axis=-1)
        dt = self._normalise(dt, self.dt_norm)
        wide = accumulation_dtype(self.dtype)
        return SelectiveScanInputs(
            x,
            self.dt_proj(dt),
            self._normalise(B, self.B_norm),
            self._normalise(C, self.C_norm),
            materialize(self.A_log, self.rules, wide),
            materialize(self.D, self.rules, wide),
            materialize(self.dt_bias, self.rules, wide),
        )

    def _normalise(self, x: jax.Array, norm: Norm | None) -> jax.Array:
        if norm is not None:
            return norm(x)
        if self.config.inner_norms == "none":
            return x
        wide = x.astype(accumulation_dtype(self.dtype))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.inner_norm_eps)).astype(x.dtype)

    def _scan_cached(
        self,
        scan_inputs: SelectiveScanInputs,
        inputs: AttentionInputs,
        cache: RecurrentCache,
    ) -> tuple[jax.Array, RecurrentCache]:
        def advance(
            state: jax.Array,
            tokens: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
            live: jax.Array,
            A_log: jax.Array,
            D: jax.Array,
            dt_bias: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            x, dt, B, C = tokens
            y, state = selective_scan(
                x,
                dt,
                -jnp.exp(A_log),
                B,
                C,
                D,
                dt_bias=dt_bias,
                initial_state=state.swapaxes(1, 2),
                live=live,
            )
            return state.swapaxes(1, 2), y

        assert inputs.batch is not None
        return cache.run(
            advance,
            [
                SplitArray(scan_inputs.x, ("mlp",)),
                SplitArray(scan_inputs.dt, ("mlp",)),
                SplitArray(scan_inputs.B, (None,)),
                SplitArray(scan_inputs.C, (None,)),
            ],
            inputs.batch,
            self.rules,
            params=[
                SplitArray(scan_inputs.A_log, ("mlp", None)),
                SplitArray(scan_inputs.D, ("mlp",)),
                SplitArray(scan_inputs.dt_bias, ("mlp",)),
            ],
            output_axes=("mlp",),
        )


def uniform(bound: float) -> Initializer:
    """Draws values evenly from −bound to bound."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# Smallest step size of a channel at the beginning, whatever dt_min is.
_STEP_FLOOR = 1e-4


def spread_step_sizes(smallest: float, largest: float) -> Initializer:
    """Draws biases whose softplus is spread evenly in logarithm from ``smallest`` to
    ``largest`` (arXiv 2312.00752, §3.6)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        low = math.log(smallest)
        high = math.log(largest)
        log_steps = jax.random.uniform(key, shape, jnp.float32, low, high)
        steps = jnp.maximum(jnp.exp(log_steps), _STEP_FLOOR)
        # The inverse of softplus, log(exp(s) − 1), without overflow.
        return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)

    return init


def count_in_logs(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Returns log 1, log 2, … log N along the last dimension."""
    del key
    counts = jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)
    return jnp.broadcast_to(jnp.log(counts), shape).astype(dtype)
