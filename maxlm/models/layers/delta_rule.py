"""What layers with a gated delta rule have in common: short convolutions of queries,
keys and values, the recurrence, a gated norm of its outputs; and what such a layer keeps
between tokens.

A head's state S [K, V] forgets by a factor, is corrected at the key towards the value,
and is read at the query (Yang et al. 2024, Gated Delta Networks, arXiv 2412.06464, eq.
10):

    S ← (I − β·k·kᵀ)·diag(exp(log decay))·S + β·k·vᵀ,   o = Sᵀ·q / √K

Shapes: B batch, S sequence, D model, H key heads, N value heads, K and V their sizes, W
width of convolutions; in inference R rows, n of them side by side, T tokens of each.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

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
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.mamba import uniform
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.recurrence_costs import count_kernel_elements
from maxlm.models.params import Initializer, declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.causal_conv import convolve_features, sharded_causal_conv
from maxlm.parallel.linear_recurrence import (
    advance_linear_recurrence,
    sharded_linear_recurrence,
)
from pallas_kernels.linear_recurrence.params import BLOCK_TOKENS

CHUNK_TOKENS = 64
"""Tokens of a chunk, whose products are one; the state is passed from chunk to
chunk."""
_KEY_NORM_EPS = 1e-6
"""Added to the square of a query's or key's length (as fla's kernels do)."""
_HEAD_AXES = ("heads", "head_dim")


class DeltaRuleSizes(NamedTuple):
    """Heads of a layer."""

    num_heads: int
    """Value heads, each with a state."""
    num_key_heads: int
    """Heads of queries and keys; each serves num_heads / num_key_heads value heads."""
    key_dim: int
    value_dim: int
    conv_width: int


class DeltaRuleInputs(NamedTuple):
    """What maps of a layer's input give."""

    query: jax.Array
    """[B, S, H, K], before the convolution, as are keys and values."""
    key: jax.Array
    """[B, S, H, K]."""
    value: jax.Array
    """[B, S, N, V]."""
    log_decay: jax.Array
    """fp32 [B, S, N], or [B, S, N, K] by key channel; not positive."""
    beta: jax.Array
    """fp32 [B, S, N], how far a state is corrected, 0 to 2."""
    gate: jax.Array
    """[B, S, N, V], of the outputs."""


class DeltaRuleStates(NamedTuple):
    """What a layer keeps of n rows."""

    inputs: tuple[jax.Array, ...]
    """Of the convolutions of queries, keys and values: the last inputs of each,
    [n, W − 1, F] in the compute dtype."""
    state: jax.Array
    """fp32 [n, N, K, V]."""


class GatedHeadNorm(nnx.Module):
    """``RMSNorm(y) · activation(gate)`` of each head by itself, with [V] weights that
    all heads share, in fp32."""

    def __init__(
        self,
        size: int,
        eps: float,
        activation: Literal["silu", "sigmoid"],
        context: BuildContext,
    ):
        self.rules = context.rules
        self.dtype = context.dtype
        self.eps = eps
        self.activate = jax.nn.silu if activation == "silu" else jax.nn.sigmoid
        ones = jax.nn.initializers.ones
        self.scale = declare((size,), (None,), ones, "vector")

    def __call__(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """y and gate [B, S, N, V] → the same shape in the compute dtype."""
        scale = materialize(self.scale, self.rules, accumulation_dtype(self.dtype))
        return save_inputs_only(self._normalise)(y, gate, scale)

    def _normalise(self, y: jax.Array, gate: jax.Array, scale: jax.Array) -> jax.Array:
        y = y.astype(scale.dtype)
        mean_square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square + self.eps) * scale
        return (y * self.activate(gate.astype(scale.dtype))).astype(self.dtype)


class DeltaRule(nnx.Module):
    """The part of a layer that is the same in all kinds; a kind has the maps and says
    what they give (:meth:`map_input`).

    Parameters here: ``query``, ``key`` and ``value`` [D, heads, size] with convolutions
    ``query_conv``, ``key_conv`` and ``value_conv`` [heads, size, W]; ``norm.scale`` [V];
    ``out`` [N, V, D].
    """

    def __init__(
        self,
        sizes: DeltaRuleSizes,
        context: BuildContext,
        *,
        norm_eps: float,
        gate_activation: Literal["silu", "sigmoid"],
    ):
        self.sizes = sizes
        self.rules = context.rules
        self.dtype = context.dtype
        self.balance_sequence = context.parallel.balance_sequence
        residual = {"embed": context.d_model}
        key_heads = {"heads": sizes.num_key_heads, "head_dim": sizes.key_dim}
        value_heads = {"heads": sizes.num_heads, "head_dim": sizes.value_dim}
        self.query = Linear(residual, key_heads, context, bias=False)
        self.key = Linear(residual, key_heads, context, bias=False)
        self.value = Linear(residual, value_heads, context, bias=False)
        self.query_conv = _declare_conv(sizes.num_key_heads, sizes.key_dim, sizes)
        self.key_conv = _declare_conv(sizes.num_key_heads, sizes.key_dim, sizes)
        self.value_conv = _declare_conv(sizes.num_heads, sizes.value_dim, sizes)
        self.norm = GatedHeadNorm(sizes.value_dim, norm_eps, gate_activation, context)
        self.out = Linear(
            value_heads, residual, context, bias=False, std=context.residual_std
        )

    def map_input(self, x: jax.Array) -> DeltaRuleInputs:
        """Maps x [B, S, D] to what the recurrence is made of."""
        raise NotImplementedError

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: RecurrentCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        mapped = self.map_input(x)
        if cache is None:
            y = self._run(mapped, inputs)
        else:
            y, cache = self._run_cached(mapped, inputs, cache)
        y = self.norm(y, mapped.gate)
        return MixerOutput(self.out(y, seq_axis="residual"), cache)

    def cache_spec(self, layout: CacheLayout, window: int | None) -> RecurrentCache:
        """A layer's cache of :class:`DeltaRuleStates`; see
        :mod:`maxlm.models.caches`."""
        del window
        sizes = self.sizes
        rows = layout.num_shards, layout.num_rows
        key_features = sizes.num_key_heads * sizes.key_dim
        value_features = sizes.num_heads * sizes.value_dim
        input_axes = ("batch", None, None, "heads")
        last_inputs = tuple(
            as_array(
                CacheArraySpec((*rows, sizes.conv_width - 1, features), input_axes)
            )
            for features in (key_features, key_features, value_features)
        )
        state = CacheArraySpec(
            (*rows, sizes.num_heads, sizes.key_dim, sizes.value_dim),
            ("batch", None, "heads", None, None),
            accumulation_dtype(self.dtype),
        )
        return RecurrentCache(DeltaRuleStates(last_inputs, as_array(state)))

    @property
    def scale(self) -> float:
        """Factor on what is read."""
        return self.sizes.key_dim**-0.5

    def _read_convs(self) -> list[jax.Array]:
        convs = (self.query_conv, self.key_conv, self.value_conv)
        return [materialize(conv, self.rules, self.dtype) for conv in convs]

    def _run(self, mapped: DeltaRuleInputs, inputs: AttentionInputs) -> jax.Array:
        """Runs whole rows: [B, S, N, V]."""
        convolve = partial(
            sharded_causal_conv,
            activation="silu",
            rules=self.rules,
            segment_ids=inputs.segment_ids,
            balanced=self.balance_sequence,
        )
        query_conv, key_conv, value_conv = self._read_convs()
        q = convolve(SplitArray(mapped.query, _HEAD_AXES), query_conv)
        k = convolve(SplitArray(mapped.key, _HEAD_AXES), key_conv)
        v = convolve(SplitArray(mapped.value, _HEAD_AXES), value_conv)
        return sharded_linear_recurrence(
            save_inputs_only(normalise_length)(q),
            save_inputs_only(normalise_length)(k),
            v,
            mapped.log_decay,
            mapped.beta,
            scale=self.scale,
            chunk_size=CHUNK_TOKENS,
            rules=self.rules,
            segment_ids=inputs.segment_ids,
            balanced=self.balance_sequence,
        )

    def _run_cached(
        self, mapped: DeltaRuleInputs, inputs: AttentionInputs, cache: RecurrentCache
    ) -> tuple[jax.Array, RecurrentCache]:
        """Runs tokens of a step of inference from the states of their rows."""

        def advance(
            states: DeltaRuleStates,
            tokens: tuple[jax.Array, ...],
            live: jax.Array,
            *convs: jax.Array,
        ) -> tuple[DeltaRuleStates, jax.Array]:
            *convolved, log_decay, beta = tokens
            outputs: list[jax.Array] = []
            last_inputs: list[jax.Array] = []
            for x, conv, before in zip(convolved, convs, states.inputs, strict=True):
                y, after = convolve_features(
                    x, conv, None, before, live=live, activation="silu"
                )
                outputs.append(y)
                last_inputs.append(after)
            q, k, v = outputs
            y, state = advance_linear_recurrence(
                normalise_length(q),
                normalise_length(k),
                v,
                log_decay,
                beta,
                state=states.state,
                live=live,
                scale=self.scale,
                chunk_size=CHUNK_TOKENS,
            )
            return DeltaRuleStates(tuple(last_inputs), state), y

        assert inputs.batch is not None
        decay_axes = _HEAD_AXES[: mapped.log_decay.ndim - 2]
        return cache.run(
            advance,
            [
                SplitArray(mapped.query, _HEAD_AXES),
                SplitArray(mapped.key, _HEAD_AXES),
                SplitArray(mapped.value, _HEAD_AXES),
                SplitArray(mapped.log_decay, decay_axes),
                SplitArray(mapped.beta, ("heads",)),
            ],
            inputs.batch,
            self.rules,
            params=[
                SplitArray(conv, (*_HEAD_AXES, None)) for conv in self._read_convs()
            ],
            output_axes=_HEAD_AXES,
        )

    def count_costs(
        self, matrices: Sequence[MatrixGroup], *, decays_by_channel: bool
    ) -> LayerCosts:
        """Counts costs of one layer with these matrices; see
        :mod:`maxlm.models.costs`."""
        sizes = self.sizes
        num_heads = sizes.num_heads
        key_dim = sizes.key_dim
        value_dim = sizes.value_dim
        key_features = sizes.num_key_heads * key_dim
        value_features = num_heads * value_dim
        convolved = 2 * key_features + value_features
        # Products with the state: what it holds at keys, what queries read, what is
        # written. Of a chunk with itself: keys with keys, queries with keys, the
        # inverse (log₂ steps of doubling, two thirds of a product in all), and it with
        # values, keys and what is written.
        with_state = 3 * 2 * key_dim * value_dim
        within_chunk = 2 * CHUNK_TOKENS * (3 * key_dim + 2 * value_dim)
        inverse = 4 / 3 * CHUNK_TOKENS**2 / 2
        product_flops = num_heads * (with_state + within_chunk + inverse)
        conv_flops = 2 * sizes.conv_width * convolved

        decays = num_heads * (key_dim if decays_by_channel else 1)
        fp32_share = 4 / jnp.dtype(self.dtype).itemsize
        # Convolutions' outputs, queries and keys of length one, outputs behind norm and
        # gate; decays and betas in fp32.
        intermediate = convolved + 2 * key_features + value_features
        intermediate += fp32_share * (decays + num_heads)
        states = num_heads * key_dim * value_dim
        # Of a block in fp32: its operands, matrices of each chunk with itself (keys with
        # keys, queries with keys, and what its inverse is made of, step by step), the
        # state at each chunk, and what is made of these; with their gradients.
        block = num_heads * (8 * CHUNK_TOKENS + 4 * value_dim + 4 * key_dim)
        block += states / CHUNK_TOKENS
        return LayerCosts(
            tuple(matrices),
            extra_flops=product_flops + conv_flops,
            product_flops=product_flops,
            flops_axes=("heads",),
            # The map of a state, [K, K] a head, and the state behind a run.
            exchanged_elements=states + num_heads * key_dim**2,
            halo_elements=convolved * (sizes.conv_width - 1),
            saved_elements=value_features,
            state_elements=states,
            state_tokens=BLOCK_TOKENS,
            intermediate_elements=intermediate,
            block_elements=2 * block,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=CHUNK_TOKENS,
            kernel_elements=count_kernel_elements(
                num_heads,
                sizes.num_key_heads,
                key_dim,
                value_dim,
                self.dtype,
                decays_by_channel=decays_by_channel,
            ),
        )


def normalise_length(x: jax.Array) -> jax.Array:
    """Divides queries or keys [..., K] by their length, in fp32."""
    wide = x.astype(accumulation_dtype(x.dtype))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + _KEY_NORM_EPS)).astype(x.dtype)


def compute_log_decay(
    logits: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    *,
    least: float | None = None,
) -> jax.Array:
    """Returns −exp(A_log) · softplus(logits + dt_bias) in fp32, as of Mamba-2's steps;
    with ``least`` it is ``least`` · sigmoid(exp(A_log) · (logits + dt_bias)).

    Args:
        logits: [B, S, N], or [B, S, N, K].
        A_log: fp32 [N].
        dt_bias: fp32 [N], or [N, K].
        least: a bound below that is not reached, negative.
    """

    def compute(logits: jax.Array, A_log: jax.Array, dt_bias: jax.Array) -> jax.Array:
        rates = jnp.exp(A_log)
        if logits.ndim == 4:
            rates = rates[:, None]
        steps = logits.astype(A_log.dtype) + dt_bias
        if least is not None:
            return least * jax.nn.sigmoid(rates * steps)
        return -rates * jax.nn.softplus(steps)

    return save_inputs_only(compute)(logits, A_log, dt_bias)


def compute_beta(logits: jax.Array, largest: float) -> jax.Array:
    """Returns ``largest`` · sigmoid(logits [B, S, N]) in fp32."""

    def compute(logits: jax.Array) -> jax.Array:
        return largest * jax.nn.sigmoid(logits.astype(accumulation_dtype(logits.dtype)))

    return save_inputs_only(compute)(logits)


def name_projections(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Names a layer's products for remat policies (``models/remat.py``)."""
    return tuple(checkpoint_name(array, "qkv") for array in arrays)


def draw_log_uniform(low: float, high: float) -> Initializer:
    """Draws the logarithms of values that are even from ``low`` to ``high``."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def _declare_conv(num_heads: int, head_dim: int, sizes: DeltaRuleSizes) -> nnx.Param:
    """Declares a convolution's weights as PyTorch begins them."""
    shape = (num_heads, head_dim, sizes.conv_width)
    bound = math.sqrt(1 / sizes.conv_width)
    return declare(shape, (*_HEAD_AXES, None), uniform(bound), "table")
