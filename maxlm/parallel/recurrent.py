"""Convolutions and scans along sequences on a mesh: each device has its own rows,
channels, and runs of a split sequence.

Shapes: B batch, S sequence, F channels, W width of a convolution, N numbers of state a
channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.config import MaxlmError
from maxlm.parallel.differentiable import ShardSpecs, run_on_shards
from maxlm.parallel.local import Axes, axis_indices, axis_size, make_spec
from maxlm.parallel.runs import SequenceRuns, shift_runs
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


class _SequenceContext(NamedTuple):
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
    feature_axis: str,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
    activation: ConvActivation | None = None,
) -> jax.Array:
    """Runs ``pallas_kernels.causal_conv`` on a mesh. Devices that share a sequence
    exchange the last W − 1 inputs of their runs.

    Args:
        x: [B, S, F], laid out by ``rules``.
        weight: [F, W].
        bias: [F].
        feature_axis: logical axis of F.
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows are in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        [B, S, F] in x's dtype.

    Raises:
        MaxlmError: runs of a split sequence that are shorter than W − 1.
    """
    seq_axes = rules.mesh_axes("seq")
    width = weight.shape[1]
    _check_run_length(x.shape[1], width, seq_axes, balanced)
    rows = rules.spec("batch", "seq", feature_axis)
    specs = ShardSpecs(
        _ConvOperands(
            rows,
            rules.spec(feature_axis, None),
            None if bias is None else rules.spec(feature_axis),
        ),
        _make_context_specs(segment_ids, rules),
        rows,
    )

    def local(operands: _ConvOperands, context: _SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x = runs.split(operands.x)
        state = None
        if runs.are_split:
            state = runs.pass_on(update_conv_state(x, width, starts), shift_runs)
        y, _ = causal_conv(
            x,
            operands.weight,
            operands.bias,
            starts=starts,
            initial_state=state,
            activation=activation,
        )
        return runs.join(y)

    context = _SequenceContext(segment_ids, axis_indices(seq_axes))
    return run_on_shards(local, _ConvOperands(x, weight, bias), context, specs)


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
        SelectiveScanInputs(
            x=rows,
            dt=rows,
            B=whole_rows,
            C=whole_rows,
            A_log=rules.spec(feature_axis, None),
            D=features,
            dt_bias=features,
        ),
        _make_context_specs(segment_ids, rules),
        rows,
    )

    def local(inputs: SelectiveScanInputs, context: _SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x = runs.split(inputs.x)
        dt = runs.split(inputs.dt)
        B = runs.split(inputs.B)
        C = runs.split(inputs.C)
        A = -jnp.exp(inputs.A_log)
        dt_bias = inputs.dt_bias
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
            inputs.D,
            dt_bias=dt_bias,
            starts=starts,
            initial_state=state,
        )
        return runs.join(y)

    context = _SequenceContext(segment_ids, axis_indices(seq_axes))
    return run_on_shards(local, inputs, context, specs, "attention")


def _find_states_before(summaries: ScanSummary) -> jax.Array:
    """Returns the state before each run of a row, [K, b, F, N], none before the
    first."""

    def advance(state: jax.Array, summary: ScanSummary) -> tuple[jax.Array, jax.Array]:
        return summary.advance(state), state

    zeros = jnp.zeros_like(summaries.offset[0])
    _, states = lax.scan(advance, zeros, summaries)
    return states


def _make_context_specs(
    segment_ids: jax.Array | None, rules: AxisRules
) -> _SequenceContext:
    index_spec = make_spec((rules.mesh_axes("seq"),))
    segment_spec = None if segment_ids is None else rules.spec("batch", "seq")
    return _SequenceContext(segment_spec, index_spec)


def _check_run_length(seq_len: int, width: int, seq_axes: Axes, balanced: bool) -> None:
    if not seq_axes:
        return
    num_runs = axis_size(seq_axes) * (2 if balanced else 1)
    if seq_len // num_runs < width - 1:
        raise MaxlmError(
            f"a sequence of {seq_len} in {num_runs} runs, shorter than the {width - 1} "
            f"tokens before it that a convolution of width {width} reads",
            where="data.seq_len",
            fix="use longer sequences, or fewer devices on mesh.context",
        )
