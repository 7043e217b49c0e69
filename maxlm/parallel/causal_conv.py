"""Short convolutions along sequences on a mesh: each device has its own rows, features,
and runs of a split sequence.

Shapes: B batch, S sequence, F channels, W width. On shards: R rows of T tokens.
"""

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.differentiable import ShardSpecs, run_on_shards
from maxlm.parallel.local import SplitArray, axis_indices
from maxlm.parallel.runs import (
    SequenceContext,
    SequenceRuns,
    check_split_length,
    count_device_runs,
    make_context_specs,
    split_runs,
)
from maxlm.sharding import AxisRules
from pallas_kernels.causal_conv import (
    ConvActivation,
    causal_conv,
    update_conv_state,
)


class _ConvOperands(NamedTuple):
    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None


def sharded_causal_conv(
    tokens: SplitArray,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
    activation: ConvActivation | None = None,
) -> jax.Array:
    """Runs ``pallas_kernels.causal_conv`` on a mesh. Devices that share a sequence
    exchange the last W − 1 inputs of their runs.

    Args:
        tokens: [B, S, *features], such as [B, S, F] or [B, S, N, H], laid out by
            ``rules``.
        weight: [*features, W].
        bias: [*features].
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows are in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        Like the tokens.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together.
    """
    x = tokens.value
    feature_axes = tokens.axes
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

    def run_shard(operands: _ConvOperands, context: SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        x = operands.x
        state = None
        if runs.are_split:
            # The first tokens of a run see the last of the run before, which another
            # device has.
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
    return run_on_shards(run_shard, operands, context, specs, arrange=split_x)


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
    # A run may have fewer tokens than the convolution sees: those of several runs then
    # stand before the next.
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
        # The window slides by as many inputs as the run brings; what is left of earlier
        # runs counts only where no document began since.
        num_new = summary.last_inputs.shape[1]
        earlier = state[:, num_new:] * summary.keeps_earlier
        return jnp.concatenate([earlier, summary.last_inputs], axis=1), state

    _, num_rows, _, num_features = summaries.last_inputs.shape
    zeros = jnp.zeros((num_rows, num_inputs, num_features), summaries.last_inputs.dtype)
    _, states = lax.scan(advance, zeros, summaries)
    return states
