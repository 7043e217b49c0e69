"""Causal convolutions, linear recurrences and selective scans of training on a mesh:
the operators of ``pallas_kernels`` in the program of
:mod:`maxlm.parallel.recurrence`.

Shapes: B batch, S sequence, H key heads, N value heads, K and V their sizes, W width of
a convolution, F channels. On shards: R rows of T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.local import axis_indices, axis_size, make_spec, map_shards
from maxlm.parallel.recurrence import Arrays, LogicalAxes, SplitArray, run_sharded
from maxlm.sharding import AxisRules
from pallas_kernels.causal_conv import ConvActivation, causal_conv, update_conv_state
from pallas_kernels.linear_recurrence import (
    RunSummary,
    apply_run,
    linear_recurrence_backward,
    linear_recurrence_forward,
    summarize_run,
)
from pallas_kernels.selective_scan import (
    ScanSummary,
    selective_scan,
    summarize_scan,
)


def sharded_causal_conv(
    tokens: Sequence[SplitArray],
    weights: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None = None,
    *,
    activation: ConvActivation | None = None,
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> Arrays:
    """Convolves arrays, each over the tokens before within a document
    (``pallas_kernels.causal_conv``), on a mesh, in one program.

    Args:
        tokens: arrays [B, S, *features], such as [B, S, N, H] with axes ("heads",
            "head_dim").
        weights: [*features, W] for each, split as its features are.
        biases: [*features] for each; None: none has any.
        activation: of the sums.
        segment_ids, balanced: see :func:`~maxlm.parallel.recurrence.run_sharded`.

    Returns:
        Arrays like ``tokens``.

    Raises:
        MaxlmError, ValueError: see :func:`~maxlm.parallel.recurrence.run_sharded`.
    """
    axes = [array.axes for array in tokens]
    params = [
        SplitArray(weight, (*features, None))
        for weight, features in zip(weights, axes, strict=True)
    ]
    if biases is not None:
        params += map(SplitArray, biases, axes)
    return run_sharded(
        CausalConv(len(tokens), weights[0].shape[-1], activation),
        tokens,
        params=params,
        output_axes=axes,
        rules=rules,
        segment_ids=segment_ids,
        balanced=balanced,
    )


def sharded_linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    scale: float = 1.0,
    chunk_size: int = 64,
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.linear_recurrence`` over whole rows on a mesh, each device
    with its own heads: key and value heads are both split as ``heads`` are
    (:func:`spread_groups` where key heads are too few).

    Args:
        q, k: [B, S, H, K].
        v: [B, S, N, V].
        log_decay: fp32 [B, S, N], or [B, S, N, K].
        beta: [B, S, N], or None.
        scale, chunk_size: see ``linear_recurrence``.
        segment_ids, balanced: see :func:`~maxlm.parallel.recurrence.run_sharded`.

    Returns:
        [B, S, N, V] in v's dtype.

    Raises:
        MaxlmError, ValueError: see :func:`~maxlm.parallel.recurrence.run_sharded`.
    """
    by_head = ("heads",)
    by_feature = ("heads", None)
    decay_axes = by_head if log_decay.ndim == 3 else by_feature
    tokens = [
        SplitArray(q, by_feature),
        SplitArray(k, by_feature),
        SplitArray(v, by_feature),
        SplitArray(log_decay, decay_axes),
    ]
    if beta is not None:
        tokens.append(SplitArray(beta, by_head))
    (y,) = run_sharded(
        LinearRecurrence(scale, chunk_size),
        tokens,
        output_axes=[by_feature],
        rules=rules,
        segment_ids=segment_ids,
        balanced=balanced,
    )
    return y


def sharded_selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    *,
    channel_axis: str = "mlp",
    chunk_tokens: int = 64,
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.selective_scan`` over whole rows on a mesh, each device
    with its own channels.

    Args:
        x, dt: [B, S, F], split along F by ``channel_axis``.
        A: [F, N], and D [F], split in the same way.
        B, C: [B, S, N].
        chunk_tokens: see ``selective_scan``.
        segment_ids, balanced: see :func:`~maxlm.parallel.recurrence.run_sharded`.

    Returns:
        [B, S, F] in x's dtype.

    Raises:
        MaxlmError, ValueError: see :func:`~maxlm.parallel.recurrence.run_sharded`.
    """
    by_channel = (channel_axis,)
    whole = (None,)
    (y,) = run_sharded(
        SelectiveScan(chunk_tokens),
        [
            SplitArray(x, by_channel),
            SplitArray(dt, by_channel),
            SplitArray(B, whole),
            SplitArray(C, whole),
        ],
        params=[SplitArray(A, (channel_axis, None)), SplitArray(D, by_channel)],
        output_axes=[by_channel],
        rules=rules,
        segment_ids=segment_ids,
        balanced=balanced,
    )
    return y


class ConvSummary(NamedTuple):
    """What a run of tokens does to the inputs that a convolution keeps."""

    last_inputs: jax.Array
    """[R, min(T, W − 1), F], the last of the run, zeros where they are of an earlier
    document than its last token."""
    keeps_earlier: jax.Array
    """[R, 1, 1], 1 where no document starts in the run, otherwise 0."""


@dataclass(frozen=True)
class CausalConv:
    """Convolutions of several token arrays, each with its own weights; the state is the
    last W − 1 inputs of each, [R, W − 1, F].

    Params are all weights [*features, W], then all biases [*features] or none.
    """

    num_arrays: int
    width: int
    activation: ConvActivation | None

    mixes_features: ClassVar[bool] = False
    saved_as: ClassVar[str | None] = None
    residual_axes: ClassVar[tuple[LogicalAxes, ...]] = ()

    def forward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: Arrays | None,
    ) -> tuple[Arrays, Arrays]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        return self._convolve(tokens, params, state, starts), ()

    def backward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: Arrays | None,
        residuals: Arrays,
        d_outputs: Arrays,
    ) -> tuple[Arrays, Arrays, Arrays | None]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del residuals
        convolve = partial(self._convolve, starts=starts)
        _, pull = jax.vjp(convolve, tokens, params, state)
        return pull(d_outputs)

    def make_state(self, tokens: Arrays, params: Arrays, num_rows: int) -> Arrays:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params
        slots = self.width - 1
        return tuple(
            jnp.zeros((num_rows, slots, _flatten(x).shape[2]), x.dtype) for x in tokens
        )

    def summarize(
        self, tokens: Arrays, params: Arrays, starts: jax.Array | None
    ) -> tuple[ConvSummary, ...]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params

        def summarize_array(x: jax.Array) -> ConvSummary:
            num_inputs = min(x.shape[1], self.width - 1)
            last_inputs = update_conv_state(_flatten(x), num_inputs + 1, starts)
            keeps_earlier = jnp.ones((x.shape[0], 1, 1), x.dtype)
            if starts is not None:
                has_start = jnp.any(starts, axis=1)
                keeps_earlier = jnp.where(has_start[:, None, None], 0, keeps_earlier)
            return ConvSummary(last_inputs, keeps_earlier)

        return tuple(map(summarize_array, tokens))

    def advance(self, summary: tuple[ConvSummary, ...], state: Arrays) -> Arrays:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""

        def advance_array(summary: ConvSummary, state: jax.Array) -> jax.Array:
            num_inputs = summary.last_inputs.shape[1]
            earlier = state[:, num_inputs:] * summary.keeps_earlier
            return jnp.concatenate([earlier, summary.last_inputs], axis=1)

        return tuple(map(advance_array, summary, state))

    def _convolve(
        self,
        tokens: Arrays,
        params: Arrays,
        state: Arrays | None,
        starts: jax.Array | None,
    ) -> Arrays:
        weights = params[: self.num_arrays]
        biases: Sequence[jax.Array | None] = params[self.num_arrays :]
        if not biases:
            biases = (None,) * self.num_arrays
        states: Sequence[jax.Array | None] = state or (None,) * self.num_arrays
        outputs = []
        for x, weight, bias, array_state in zip(
            tokens, weights, biases, states, strict=True
        ):
            y, _ = convolve_features(
                x, weight, bias, array_state, starts=starts, activation=self.activation
            )
            outputs.append(y)
        return tuple(outputs)


def convolve_features(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    *,
    starts: jax.Array | None = None,
    live: jax.Array | None = None,
    activation: ConvActivation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``causal_conv`` over features of several dimensions, on one device.

    Args:
        x: [R, T, *features].
        weight: [*features, W].
        bias: [*features], or None.
        state: [R, W − 1, F], F the product of features; None: zeros.
        starts, live, activation: see ``causal_conv``.

    Returns:
        y like x, and the state after the last live token.
    """
    width = weight.shape[-1]
    y, new_state = causal_conv(
        _flatten(x),
        weight.reshape(-1, width),
        None if bias is None else bias.reshape(-1),
        starts=starts,
        initial_state=state,
        live=live,
        activation=activation,
    )
    return y.reshape(x.shape), new_state


def _flatten(x: jax.Array) -> jax.Array:
    """[R, T, *features] → [R, T, F]."""
    return x.reshape(*x.shape[:2], -1)


@dataclass(frozen=True)
class LinearRecurrence:
    """``pallas_kernels.linear_recurrence``: tokens are q, k, v, log decay and, with the
    delta rule, beta; the state is fp32 [R, N, K, V]."""

    scale: float
    chunk_size: int

    mixes_features: ClassVar[bool] = True
    saved_as: ClassVar[str | None] = "attention"
    # States at the starts of blocks, [blocks, R, N, K, V].
    residual_axes: ClassVar[tuple[LogicalAxes, ...]] = (
        (None, "batch", "heads", None, None),
    )

    def forward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: jax.Array | None,
    ) -> tuple[Arrays, Arrays]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params
        y, block_states = linear_recurrence_forward(
            *tokens,
            initial_state=state,
            starts=starts,
            scale=self.scale,
            chunk_size=self.chunk_size,
        )
        return (y,), (block_states,)

    def backward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: jax.Array | None,
        residuals: Arrays,
        d_outputs: Arrays,
    ) -> tuple[Arrays, Arrays, jax.Array]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params, state
        q, k, v, log_decay, *rest = tokens
        beta = rest[0] if rest else None
        (block_states,) = residuals
        (d_y,) = d_outputs
        gradients, d_state = linear_recurrence_backward(
            q,
            k,
            v,
            log_decay,
            beta,
            block_states,
            d_y,
            starts=starts,
            scale=self.scale,
            chunk_size=self.chunk_size,
        )
        d_tokens = tuple(x for x in gradients if x is not None)
        return d_tokens, (), d_state

    def make_state(self, tokens: Arrays, params: Arrays, num_rows: int) -> jax.Array:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params
        k = tokens[1]
        v = tokens[2]
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        return jnp.zeros((num_rows, v.shape[2], k.shape[3], v.shape[3]), dtype)

    def summarize(
        self, tokens: Arrays, params: Arrays, starts: jax.Array | None
    ) -> RunSummary:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del params
        return summarize_run(*tokens[1:], starts=starts, chunk_size=self.chunk_size)

    def advance(self, summary: RunSummary, state: jax.Array) -> jax.Array:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        return apply_run(summary, state)


@dataclass(frozen=True)
class SelectiveScan:
    """``pallas_kernels.selective_scan``: tokens are x, dt, B and C, params A and D; the
    state is fp32 [R, F, N]."""

    chunk_tokens: int

    mixes_features: ClassVar[bool] = True
    saved_as: ClassVar[str | None] = "attention"
    residual_axes: ClassVar[tuple[LogicalAxes, ...]] = ()

    def forward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: jax.Array | None,
    ) -> tuple[Arrays, Arrays]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        return self._scan(tokens, params, state, starts), ()

    def backward(
        self,
        tokens: Arrays,
        params: Arrays,
        starts: jax.Array | None,
        state: jax.Array | None,
        residuals: Arrays,
        d_outputs: Arrays,
    ) -> tuple[Arrays, Arrays, jax.Array | None]:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        del residuals
        scan = partial(self._scan, starts=starts)
        _, pull = jax.vjp(scan, tokens, params, state)
        return pull(d_outputs)

    def make_state(self, tokens: Arrays, params: Arrays, num_rows: int) -> jax.Array:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        dtype = jnp.promote_types(tokens[0].dtype, jnp.float32)
        return jnp.zeros((num_rows, *params[0].shape), dtype)

    def summarize(
        self, tokens: Arrays, params: Arrays, starts: jax.Array | None
    ) -> ScanSummary:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        x, dt, B, _ = tokens
        A, _ = params
        return summarize_scan(
            x, dt, A, B, starts=starts, chunk_tokens=self.chunk_tokens
        )

    def advance(self, summary: ScanSummary, state: jax.Array) -> jax.Array:
        """See :class:`~maxlm.parallel.recurrence.SequenceOperator`."""
        return summary.advance(state)

    def _scan(
        self,
        tokens: Arrays,
        params: Arrays,
        state: jax.Array | None,
        starts: jax.Array | None,
    ) -> Arrays:
        x, dt, B, C = tokens
        A, D = params
        y, _ = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            starts=starts,
            initial_state=state,
            chunk_tokens=self.chunk_tokens,
        )
        return (y,)


def spread_groups(x: jax.Array, num_heads: int, rules: AxisRules) -> jax.Array:
    """Returns key heads for :func:`sharded_linear_recurrence` on devices that split the
    value heads, where key heads are whole on each: those that its own value heads read.

    Args:
        x: [B, S, H, K], H a divisor of ``num_heads``, not split.
        num_heads: N.

    Returns:
        [B, S, ways · heads a device, K], split by ``heads``; x itself where heads are
        not split. Its gradient is summed over devices.

    Raises:
        ValueError: value heads of a device that straddle the groups of a key head.
    """
    ways = axis_size(rules.mesh_axes("heads"))
    if ways == 1:
        return x
    heads_per_device = num_heads // ways
    group_size = num_heads // x.shape[2]
    if heads_per_device % group_size and group_size % heads_per_device:
        raise ValueError(
            f"{heads_per_device} value heads a device straddle groups of {group_size}"
        )
    return _spread(x, num_heads, rules)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(x: jax.Array, num_heads: int, rules: AxisRules) -> jax.Array:
    head_axes = rules.mesh_axes("heads")

    def local(x: jax.Array, device_index: jax.Array) -> jax.Array:
        first, count = _find_group(x.shape[2], num_heads, rules, device_index)
        return lax.dynamic_slice_in_dim(x, first, count, axis=2)

    return map_shards(
        local,
        in_specs=(rules.spec("batch", "seq", None, None), make_spec((head_axes,))),
        out_specs=rules.spec("batch", "seq", "heads", None),
    )(x, axis_indices(head_axes))


def _spread_forward(x, num_heads, rules):
    return _spread(x, num_heads, rules), x


def _spread_backward(num_heads, rules, x, d_y):
    head_axes = rules.mesh_axes("heads")

    def local(x: jax.Array, d_y: jax.Array, device_index: jax.Array) -> jax.Array:
        first, _ = _find_group(x.shape[2], num_heads, rules, device_index)
        d_x = lax.dynamic_update_slice_in_dim(jnp.zeros_like(x), d_y, first, axis=2)
        return lax.psum(d_x, head_axes)

    whole = rules.spec("batch", "seq", None, None)
    d_x = map_shards(
        local,
        in_specs=(
            whole,
            rules.spec("batch", "seq", "heads", None),
            make_spec((head_axes,)),
        ),
        out_specs=whole,
    )(x, d_y, axis_indices(head_axes))
    return (d_x,)


_spread.defvjp(_spread_forward, _spread_backward)


def _find_group(
    num_key_heads: int, num_heads: int, rules: AxisRules, device_index: jax.Array
) -> tuple[jax.Array, int]:
    """Returns the first key head that this device's value heads read, and how many."""
    heads_per_device = num_heads // axis_size(rules.mesh_axes("heads"))
    group_size = num_heads // num_key_heads
    first = device_index[0] * heads_per_device // group_size
    return first, max(heads_per_device // group_size, 1)
