"""Convolutions and scans along sequences on a mesh: each device has its own rows,
channels, and runs of a split sequence.

Shapes: B batch, S sequence, F channels, W width of a convolution, N numbers of state a
channel.
"""

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.config.errors import check_requirements
from maxlm.parallel.context import require_split_length
from maxlm.parallel.differentiable import ShardSpecs, run_on_shards
from maxlm.parallel.local import axis_indices, make_spec
from maxlm.parallel.runs import SequenceRuns, count_device_runs, split_runs
from maxlm.sharding import AxisRules
from pallas_kernels.causal_conv import (
    ConvActivation,
    causal_conv,
    update_conv_state,
)
from pallas_kernels.selective_scan import (
    ScanSummary,
    selective_scan,
    summarize_scan,
)


class SequenceContext(NamedTuple):
    """What a device knows of its rows beside their features."""

    segment_ids: jax.Array | None
    device_index: jax.Array
    """int32 [1], along the axes of ``seq``."""


class _ConvOperands(NamedTuple):
    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None


class SelectiveScanInputs(NamedTuple):
    """Arguments of a selective scan (``pallas_kernels.selective_scan``), as Mamba's
    layers have them."""

    x: jax.Array
    """[B, S, F]."""
    dt: jax.Array
    """[B, S, F]: softplus(dt + dt_bias) are the step sizes."""
    B: jax.Array
    """[B, S, N]."""
    C: jax.Array
    """[B, S, N]."""
    A_log: jax.Array
    """fp32 [F, N]: the rates of decay are −exp(A_log)."""
    D: jax.Array
    """fp32 [F]."""
    dt_bias: jax.Array
    """fp32 [F]."""


def sharded_causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    rules: AxisRules,
    feature_axes: tuple[str | None, ...],
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
    activation: ConvActivation | None = None,
) -> jax.Array:
    """Runs ``pallas_kernels.causal_conv`` on a mesh. Devices that share a sequence
    exchange the last W − 1 inputs of their runs.

    Args:
        x: [B, S, *features], such as [B, S, F] or [B, S, N, H], laid out by ``rules``.
        weight: [*features, W].
        bias: [*features].
        feature_axes: logical axes of the features.
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows are in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        Like x.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together.
    """
    check_split_length(x.shape[1], rules, balanced)
    seq_axes = rules.mesh_axes("seq")
    width = weight.shape[-1]
    rows = rules.spec("batch", "seq", *feature_axes)
    specs = ShardSpecs(
        # A tree of specs in the place of arrays.
        _ConvOperands._make(
            (
                rows,
                rules.spec(*feature_axes, None),
                None if bias is None else rules.spec(*feature_axes),
            )
        ),
        make_context_specs(segment_ids, rules),
        rows,
    )

    num_runs = count_device_runs(seq_axes, balanced)

    def split_x(operands: _ConvOperands) -> _ConvOperands:
        return operands._replace(x=split_runs(operands.x, num_runs))

    def local(operands: _ConvOperands, context: SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x = operands.x
        state = None
        if runs.are_split:
            summary = _summarize_conv(_flatten_features(x), width, starts)
            find_inputs = partial(_find_inputs_before, num_inputs=width - 1)
            state = runs.pass_on(summary, find_inputs)
        y, _ = convolve_features(
            x,
            operands.weight,
            operands.bias,
            state,
            starts=starts,
            activation=activation,
        )
        return runs.join(y)

    context = SequenceContext(segment_ids, axis_indices(seq_axes))
    operands = _ConvOperands(x, weight, bias)
    return run_on_shards(local, operands, context, specs, arrange=split_x)


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
        _flatten_features(x),
        weight.reshape(-1, width),
        None if bias is None else bias.reshape(-1),
        starts=starts,
        initial_state=state,
        live=live,
        activation=activation,
    )
    return y.reshape(x.shape), new_state


def _flatten_features(x: jax.Array) -> jax.Array:
    """Returns x [R, T, *features] as [R, T, F]."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


class _ConvSummary(NamedTuple):
    """What a run of c tokens does to the last inputs, which a convolution keeps."""

    last_inputs: jax.Array
    """[R, min(c, W − 1), F], the run's last, zeros where they are of an earlier document
    than its last token."""
    keeps_earlier: jax.Array
    """[R, 1, 1]: 1 where no document starts in the run, otherwise 0."""


def _summarize_conv(x: jax.Array, width: int, starts: jax.Array | None) -> _ConvSummary:
    num_inputs = min(x.shape[1], width - 1)
    last_inputs = update_conv_state(x, num_inputs + 1, starts)
    keeps_earlier = jnp.ones((x.shape[0], 1, 1), x.dtype)
    if starts is not None:
        has_start = jnp.any(starts, axis=1)
        keeps_earlier = jnp.where(has_start[:, None, None], 0, keeps_earlier)
    return _ConvSummary(last_inputs, keeps_earlier)


def _find_inputs_before(summaries: _ConvSummary, num_inputs: int) -> jax.Array:
    """Returns the last ``num_inputs`` inputs before each run of a row, [K, b,
    num_inputs, F], zeros before the first."""

    def advance(state: jax.Array, summary: _ConvSummary) -> tuple[jax.Array, jax.Array]:
        num_new = summary.last_inputs.shape[1]
        earlier = state[:, num_new:] * summary.keeps_earlier
        return jnp.concatenate([earlier, summary.last_inputs], axis=1), state

    _, num_rows, _, num_features = summaries.last_inputs.shape
    zeros = jnp.zeros((num_rows, num_inputs, num_features), summaries.last_inputs.dtype)
    _, states = lax.scan(advance, zeros, summaries)
    return states


def sharded_selective_scan(
    inputs: SelectiveScanInputs,
    *,
    rules: AxisRules,
    feature_axis: str,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.selective_scan`` on a mesh. Devices that share a sequence
    exchange what their runs do to the state, and then scan all at once: those twice,
    for what they do is found by a scan.

    Args: as of :func:`sharded_causal_conv`.

    Returns:
        y [B, S, F] in x's dtype. With what the backward pass needs it has the name
        "attention" for remat policies.
    """
    seq_axes = rules.mesh_axes("seq")
    rows = rules.spec("batch", "seq", feature_axis)
    whole_rows = rules.spec("batch", "seq", None)
    features = rules.spec(feature_axis)
    specs = ShardSpecs(
        SelectiveScanInputs._make(
            (
                rows,  # x
                rows,  # dt
                whole_rows,  # B
                whole_rows,  # C
                rules.spec(feature_axis, None),  # A_log
                features,  # D
                features,  # dt_bias
            )
        ),
        make_context_specs(segment_ids, rules),
        rows,
    )

    num_runs = count_device_runs(seq_axes, balanced)

    def split_inputs(inputs: SelectiveScanInputs) -> SelectiveScanInputs:
        return inputs._replace(
            x=split_runs(inputs.x, num_runs),
            dt=split_runs(inputs.dt, num_runs),
            B=split_runs(inputs.B, num_runs),
            C=split_runs(inputs.C, num_runs),
        )

    def local(inputs: SelectiveScanInputs, context: SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x, dt, B, C, A_log, D, dt_bias = inputs
        A = -jnp.exp(A_log)
        state = None
        if runs.are_split:
            summary = summarize_scan(x, dt, A, B, dt_bias=dt_bias, starts=starts)
            state = runs.pass_on(summary, _find_states_before)
        y, _ = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias=dt_bias,
            starts=starts,
            initial_state=state,
        )
        return runs.join(y)

    context = SequenceContext(segment_ids, axis_indices(seq_axes))
    return run_on_shards(local, inputs, context, specs, "attention", split_inputs)


def _find_states_before(summaries: ScanSummary) -> jax.Array:
    """Returns the state before each run of a row, [K, b, F, N], none before the
    first."""

    def advance(state: jax.Array, summary: ScanSummary) -> tuple[jax.Array, jax.Array]:
        return summary.advance(state), state

    zeros = jnp.zeros_like(summaries.offset[0])
    _, states = lax.scan(advance, zeros, summaries)
    return states


def make_context_specs(
    segment_ids: jax.Array | None, rules: AxisRules
) -> SequenceContext:
    """Returns the specs of a program's context."""
    index_spec = make_spec((rules.mesh_axes("seq"),))
    segment_spec = None if segment_ids is None else rules.spec("batch", "seq")
    return SequenceContext._make((segment_spec, index_spec))


def check_split_length(seq_len: int, rules: AxisRules, balanced: bool) -> None:
    """Raises MaxlmError: a sequence that does not divide over its devices."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    requirements = require_split_length(
        seq_len, rules=rules, sizes=sizes, balanced=balanced
    )
    check_requirements(requirements)
