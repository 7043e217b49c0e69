"""Short convolutions and linear recurrences over whole rows on a mesh, as training runs
them.

Each device runs its own rows and heads. Where the rules split the sequence (**context
parallelism**), it has one run of neighbouring tokens, or in balanced order an early and
a late one, and states pass between runs (:mod:`maxlm.parallel.runs`): each run is
summarized by what it does to a state before it, the summaries of all runs are
all-gathered and applied in the order of the sequence, and each run is computed from the
state before it. Traffic and memory are those of one state a run, whatever the length of
the sequence. A document that goes on from the run before is not reset there.

Shapes: B batch, S sequence, H key heads, N value heads, K and V their sizes, W width of
a convolution. On shards: b rows of s tokens.
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
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import axis_indices, axis_size, make_spec
from maxlm.parallel.runs import SequenceRuns
from maxlm.sharding import AxisRules
from pallas_kernels.causal_conv import ConvActivation, causal_conv, update_conv_state
from pallas_kernels.linear_recurrence import (
    RunSummary,
    apply_run,
    linear_recurrence_backward,
    linear_recurrence_forward,
    summarize_run,
)
from pallas_kernels.linear_recurrence.params import RecurrenceOperands


class _DeviceContext(NamedTuple):
    """What a device knows of its rows beside their features."""

    segment_ids: jax.Array | None
    """int [b, s]."""
    seq_index: jax.Array
    """int32 [1]: the device's number along the axes of ``seq``."""
    heads_index: jax.Array | None
    """int32 [1]: along those of ``heads``, where key heads are whole on each device;
    None: they are split as value heads are."""


def _make_context(
    rules: AxisRules, segment_ids: jax.Array | None, *, has_heads_index: bool = False
) -> tuple[_DeviceContext, _DeviceContext]:
    """Returns a program's context, and the specs of its arrays."""
    seq_axes = rules.mesh_axes("seq")
    head_axes = rules.mesh_axes("heads")
    context = _DeviceContext(
        segment_ids,
        axis_indices(seq_axes),
        axis_indices(head_axes) if has_heads_index else None,
    )
    specs = _DeviceContext(
        None if segment_ids is None else rules.spec("batch", "seq"),
        make_spec((seq_axes,)),
        make_spec((head_axes,)) if has_heads_index else None,
    )
    return context, specs


def _check_length(seq_len: int, rules: AxisRules, balanced: bool) -> None:
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    requirements = require_split_length(
        seq_len, rules=rules, sizes=sizes, balanced=balanced
    )
    check_requirements(requirements)


class ConvWeights(NamedTuple):
    """Of one depthwise convolution."""

    weight: jax.Array
    """[*features, W], the current token's last."""
    bias: jax.Array | None = None
    """[*features]."""


class _ConvOperands(NamedTuple):
    x: jax.Array
    weights: ConvWeights


def sharded_causal_conv(
    x: jax.Array,
    weights: ConvWeights,
    axes: tuple[str | None, ...],
    *,
    activation: ConvActivation | None = None,
    rules: AxisRules,
    segment_ids: jax.Array | None = None,
    balanced: bool = False,
) -> jax.Array:
    """Runs ``pallas_kernels.causal_conv`` over whole rows on a mesh.

    Args:
        x: [B, S, *features], such as [B, S, N, H], laid out by ``rules``.
        weights: split as the features are.
        axes: logical axes of the features, such as ("heads", "head_dim").
        activation: of the sums.
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows stand in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        Like x.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together.
    """
    _check_length(x.shape[1], rules, balanced)
    seq_axes = rules.mesh_axes("seq")
    context, context_specs = _make_context(rules, segment_ids)
    rows = rules.spec("batch", "seq", *axes)
    bias_spec = None if weights.bias is None else rules.spec(*axes)
    weight_specs = ConvWeights(rules.spec(*axes, None), bias_spec)
    width = weights.weight.shape[-1]

    def local(operands: _ConvOperands, context: _DeviceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.seq_index)
        starts = runs.find_starts(context.segment_ids)
        x = runs.split(operands.x)
        state = None
        if runs.are_split:
            summary = _summarize_conv(flatten_features(x), width, starts)
            state = runs.pass_on(summary, _find_conv_states)
        y, _ = convolve(
            x, operands.weights, state, starts=starts, activation=activation
        )
        return runs.join(y)

    specs = ShardSpecs(_ConvOperands(rows, weight_specs), context_specs, rows)
    return run_on_shards(local, _ConvOperands(x, weights), context, specs)


def convolve(
    x: jax.Array,
    weights: ConvWeights,
    state: jax.Array | None,
    *,
    starts: jax.Array | None = None,
    live: jax.Array | None = None,
    activation: ConvActivation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``causal_conv`` over features of several dimensions, on one device.

    Args:
        x: [b, s, *features].
        state: [b, W − 1, F], F the product of features; None: zeros.
        starts, live, activation: see ``causal_conv``.

    Returns:
        y like x, and the state after the last live token.
    """
    width = weights.weight.shape[-1]
    bias = weights.bias
    y, new_state = causal_conv(
        flatten_features(x),
        weights.weight.reshape(-1, width),
        None if bias is None else bias.reshape(-1),
        starts=starts,
        initial_state=state,
        live=live,
        activation=activation,
    )
    return y.reshape(x.shape), new_state


def flatten_features(x: jax.Array) -> jax.Array:
    """Returns x [b, s, *features] as [b, s, F]."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


class _ConvSummary(NamedTuple):
    """What a run of c tokens does to the last inputs, which a convolution keeps."""

    last_inputs: jax.Array
    """[b, min(c, W − 1), F], the run's last, zeros where they are of an earlier document
    than its last token."""
    keeps_earlier: jax.Array
    """[b, 1, 1]: 1 where no document starts in the run, otherwise 0."""
    no_inputs: jax.Array
    """[b, W − 1, F], zeros: what is before any run."""


def _summarize_conv(
    x: jax.Array, width: int, starts: jax.Array | None
) -> _ConvSummary:
    num_rows, num_tokens, num_features = x.shape
    num_inputs = min(num_tokens, width - 1)
    last_inputs = update_conv_state(x, num_inputs + 1, starts)
    keeps_earlier = jnp.ones((num_rows, 1, 1), x.dtype)
    if starts is not None:
        has_start = jnp.any(starts, axis=1)
        keeps_earlier = jnp.where(has_start[:, None, None], 0, keeps_earlier)
    no_inputs = jnp.zeros((num_rows, width - 1, num_features), x.dtype)
    return _ConvSummary(last_inputs, keeps_earlier, no_inputs)


def _find_conv_states(summaries: _ConvSummary) -> jax.Array:
    """Returns the last W − 1 inputs before each run, [runs, b, W − 1, F]."""

    def advance(
        state: jax.Array, summary: _ConvSummary
    ) -> tuple[jax.Array, jax.Array]:
        num_inputs = summary.last_inputs.shape[1]
        earlier = state[:, num_inputs:] * summary.keeps_earlier
        return jnp.concatenate([earlier, summary.last_inputs], axis=1), state

    _, states = lax.scan(advance, summaries.no_inputs[0], summaries)
    return states


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
    splits_key_heads: bool = True,
) -> jax.Array:
    """Runs ``pallas_kernels.linear_recurrence`` over whole rows on a mesh, each device
    with its own value heads, split as ``heads`` are.

    Args:
        q, k: [B, S, H, K].
        v: [B, S, N, V].
        log_decay: fp32 [B, S, N], or [B, S, N, K].
        beta: [B, S, N], or None.
        scale, chunk_size: see ``linear_recurrence``.
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows stand in the balanced order of
            ``context.sequence_order_indices``.
        splits_key_heads: whether key heads are split as value heads are. Otherwise they
            are whole on every device, which reads those of its own value heads: few
            groups of keys under more devices.

    Returns:
        [B, S, N, V] in v's dtype. With what the backward pass needs it has the name
        "attention" for remat policies.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together; value heads of a device that
            straddle the groups of key heads.
    """
    _check_length(q.shape[1], rules, balanced)
    seq_axes = rules.mesh_axes("seq")
    head_axes = rules.mesh_axes("heads")
    num_key_heads = q.shape[2]
    num_heads = v.shape[2]
    selects_keys = bool(head_axes) and not splits_key_heads and num_key_heads > 1
    heads_per_device = num_heads // axis_size(head_axes)
    group_size = num_heads // num_key_heads
    if selects_keys and heads_per_device % group_size and group_size % heads_per_device:
        raise ValueError(
            f"{heads_per_device} value heads a device straddle groups of {group_size}"
        )
    context, context_specs = _make_context(
        rules, segment_ids, has_heads_index=selects_keys
    )
    keys = rules.spec("batch", "seq", "heads" if splits_key_heads else None, None)
    values = rules.spec("batch", "seq", "heads", None)
    numbers = rules.spec("batch", "seq", "heads")
    specs = ShardSpecs(
        RecurrenceOperands(
            keys,
            keys,
            values,
            numbers if log_decay.ndim == 3 else values,
            None if beta is None else numbers,
        ),
        context_specs,
        values,
    )

    def select_keys(x: jax.Array, heads_index: jax.Array) -> jax.Array:
        """Selects the key heads that this device's value heads read."""
        first = heads_index[0] * heads_per_device // group_size
        count = max(heads_per_device // group_size, 1)
        return lax.dynamic_slice_in_dim(x, first, count, axis=2)

    def local(operands: RecurrenceOperands, context: _DeviceContext) -> jax.Array:
        assert operands.q is not None
        if context.heads_index is not None:
            operands = operands._replace(
                q=select_keys(operands.q, context.heads_index),
                k=select_keys(operands.k, context.heads_index),
            )
        runs = SequenceRuns(seq_axes, balanced, context.seq_index)
        starts = runs.find_starts(context.segment_ids)
        state = None
        if runs.are_split:

            def summarize(operands: RecurrenceOperands) -> RunSummary:
                _, *others = jax.tree.map(runs.split, operands)
                return summarize_run(*others, starts=starts, chunk_size=chunk_size)

            # What its backward pass needs is as much as that of the runs themselves.
            summarize = jax.checkpoint(summarize, prevent_cse=False)
            state = runs.pass_on(summarize(operands), _find_states)
        call = _LocalCall(scale, chunk_size, runs.runs_per_device)
        return _recur_runs(operands, starts, state, call)

    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    return run_on_shards(local, operands, context, specs, "attention")


def _find_states(summaries: RunSummary) -> jax.Array:
    """Returns the state before each run, [runs, b, N, K, V], zeros before the first."""

    def advance(state: jax.Array, summary: RunSummary) -> tuple[jax.Array, jax.Array]:
        return apply_run(summary, state), state

    zeros = jnp.zeros_like(summaries.state[0])
    _, states = lax.scan(advance, zeros, summaries)
    return states


class _LocalCall(NamedTuple):
    """What is static of a recurrence on shards."""

    scale: float
    chunk_size: int
    runs_per_device: int

    def split(self, tree: PyTree) -> PyTree:
        """Splits arrays of rows [b, s, ...] into runs, [b · runs, c, ...]."""
        runs = self.runs_per_device

        def split_array(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] * runs, x.shape[1] // runs, *x.shape[2:])

        return jax.tree.map(split_array, tree)


# A gradient of its own, so that the program keeps its operands as they are given and
# states at the starts of blocks, not operands again as runs or with documents marked.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recur_runs(
    operands: RecurrenceOperands,
    starts: jax.Array | None,
    state: jax.Array | None,
    call: _LocalCall,
) -> jax.Array:
    return _recur_runs_forward(operands, starts, state, call)[0]


def _recur_runs_forward(operands, starts, state, call):
    y, block_states = linear_recurrence_forward(
        *call.split(operands),
        initial_state=state,
        starts=starts,
        scale=call.scale,
        chunk_size=call.chunk_size,
    )
    has_state = state is not None
    return y.reshape(operands.v.shape), (operands, starts, block_states, has_state)


def _recur_runs_backward(call, saved, d_y):
    operands, starts, block_states, has_state = saved
    gradients, d_state = linear_recurrence_backward(
        *call.split(operands),
        block_states,
        call.split(d_y),
        starts=starts,
        scale=call.scale,
        chunk_size=call.chunk_size,
    )
    d_operands = jax.tree.map(
        lambda gradient, x: gradient.reshape(x.shape), gradients, operands
    )
    return d_operands, None, d_state if has_state else None


_recur_runs.defvjp(_recur_runs_forward, _recur_runs_backward)
