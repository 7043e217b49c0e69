"""Linear recurrences over whole rows on a mesh, as layers train: Mamba-2, delta rules,
lightning attention.

Each device runs its own rows and heads. Where the rules split the sequence (context
parallelism), states pass between its runs (:mod:`maxlm.parallel.runs`): each run is
summarized by what it does to a state before it, the summaries of all runs are
all-gathered and applied in the order of the sequence, and each run is computed from the
state before it. Traffic and memory are those of one state a run, whatever the length of
the sequence. A document that goes on from the run before is not reset there.

Shapes: B batch, S sequence, H key heads, N value heads, K and V their sizes. On
shards: b rows of s tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.differentiable import ShardSpecs, run_on_shards
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import (
    axis_indices,
    axis_size,
    make_spec,
    map_shards,
)
from maxlm.parallel.runs import (
    SequenceContext,
    SequenceRuns,
    check_split_length,
    make_context_specs,
)
from maxlm.sharding import AxisRules
from pallas_kernels.linear_recurrence import (
    StateTransition,
    apply_run,
    linear_recurrence,
    linear_recurrence_backward,
    linear_recurrence_forward,
    linear_recurrence_step,
    summarize_run,
)
from pallas_kernels.linear_recurrence.params import RecurrenceOperands


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
        segment_ids: int [B, S], documents of packed rows; None: a row is one.
        balanced: whether rows stand in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        [B, S, N, V] in v's dtype. With what the backward pass needs it has the name
        "attention" for remat policies.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
        ValueError: shapes that do not belong together.
    """
    check_split_length(q.shape[1], rules, balanced)
    seq_axes = rules.mesh_axes("seq")
    by_feature = rules.spec("batch", "seq", "heads", None)
    by_head = rules.spec("batch", "seq", "heads")
    specs = ShardSpecs(
        # A tree of specs in the place of arrays.
        RecurrenceOperands._make(
            (
                by_feature,
                by_feature,
                by_feature,
                by_head if log_decay.ndim == 3 else by_feature,
                None if beta is None else by_head,
            )
        ),
        make_context_specs(segment_ids, rules),
        by_feature,
    )

    def run_shard(operands: RecurrenceOperands, context: SequenceContext) -> jax.Array:
        runs = SequenceRuns(seq_axes, balanced, context.device_index)
        starts = runs.find_starts(context.segment_ids)
        state = None
        # Without a split there is nothing before the first token, and no second pass.
        if runs.are_split:

            def summarize(operands: RecurrenceOperands) -> StateTransition:
                beta = operands.beta
                return summarize_run(
                    runs.split(operands.k),
                    runs.split(operands.v),
                    runs.split(operands.log_decay),
                    None if beta is None else runs.split(beta),
                    starts=starts,
                    chunk_size=chunk_size,
                )

            # What its backward pass needs is as much as that of the runs themselves.
            summary = jax.checkpoint(summarize, prevent_cse=False)(operands)
            state = runs.pass_on(summary, _find_states_before)
        call = _RecurrenceCall(
            scale, chunk_size, runs.runs_per_device, has_state=runs.are_split
        )
        return _recur(operands, starts, state, call)

    operands = RecurrenceOperands(q, k, v, log_decay, beta)
    context = SequenceContext(segment_ids, axis_indices(seq_axes))
    return run_on_shards(run_shard, operands, context, specs, "attention")


def _find_states_before(summaries: StateTransition) -> jax.Array:
    """Returns the state before each run of a row, [K, b, ...], zeros before the
    first."""

    def advance(
        state: jax.Array, summary: StateTransition
    ) -> tuple[jax.Array, jax.Array]:
        return apply_run(summary, state), state

    zeros = jnp.zeros_like(summaries.state[0])
    _, states = lax.scan(advance, zeros, summaries)
    return states


def advance_linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None = None,
    *,
    state: jax.Array,
    live: jax.Array,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Runs tokens of a step of inference on one device, from the states of their rows:
    one token each as decoding does, more in chunks.

    Args:
        q, k, v, log_decay, beta: [n, T, ...], see ``linear_recurrence``.
        state: fp32 [n, N, K, V].
        live: bool [n, T]; tokens that are not live leave the state as it is.
        scale, chunk_size: see ``linear_recurrence``.

    Returns:
        [n, T, N, V] in v's dtype, and the states after the tokens in ``state``'s dtype.
    """
    if v.shape[1] > 1:
        y, new_state = linear_recurrence(
            q,
            k,
            v,
            log_decay,
            beta,
            initial_state=state,
            token_mask=live,
            scale=scale,
            chunk_size=chunk_size,
        )
        return y, new_state.astype(state.dtype)
    y, new_state = linear_recurrence_step(
        q[:, 0],
        k[:, 0],
        v[:, 0],
        log_decay[:, 0],
        None if beta is None else beta[:, 0],
        state=state,
        token_mask=live[:, 0],
        scale=scale,
    )
    return y[:, None], new_state.astype(state.dtype)


class _RecurrenceCall(NamedTuple):
    """What is static of a recurrence on shards."""

    scale: float
    chunk_size: int
    runs_per_device: int
    has_state: bool
    """Whether there is something before the first token."""

    def split(self, tree: PyTree) -> PyTree:
        """Splits arrays of rows [b, s, ...] into runs, [b · runs, c, ...]."""
        runs = self.runs_per_device

        def split_array(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] * runs, x.shape[1] // runs, *x.shape[2:])

        return jax.tree.map(split_array, tree)


# A gradient of its own, so that the program keeps its operands as they came and the
# states at starts of blocks, not operands again, cut into runs and with marks of starts.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recur(
    operands: RecurrenceOperands,
    starts: jax.Array | None,
    state: jax.Array | None,
    call: _RecurrenceCall,
) -> jax.Array:
    return _recur_forward(operands, starts, state, call)[0]


def _recur_forward(operands, starts, state, call):
    q, k, v, log_decay, beta = call.split(operands)
    y, block_states = linear_recurrence_forward(
        q,
        k,
        v,
        log_decay,
        beta,
        initial_state=state,
        starts=starts,
        scale=call.scale,
        chunk_size=call.chunk_size,
    )
    y = y.reshape(operands.v.shape)
    return y, (operands, starts, block_states)


def _recur_backward(call, saved, d_y):
    operands, starts, block_states = saved
    q, k, v, log_decay, beta = call.split(operands)
    gradients, d_state = linear_recurrence_backward(
        q,
        k,
        v,
        log_decay,
        beta,
        block_states,
        call.split(d_y),
        starts=starts,
        scale=call.scale,
        chunk_size=call.chunk_size,
    )
    d_operands = jax.tree.map(
        lambda gradient, x: gradient.reshape(x.shape), gradients, operands
    )
    return d_operands, None, d_state if call.has_state else None


_recur.defvjp(_recur_forward, _recur_backward)


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

    def take_shard(x: jax.Array, device_index: jax.Array) -> jax.Array:
        first, count = _find_group(x.shape[2], num_heads, rules, device_index)
        return lax.dynamic_slice_in_dim(x, first, count, axis=2)

    return map_shards(
        take_shard,
        in_specs=(rules.spec("batch", "seq", None, None), make_spec((head_axes,))),
        out_specs=rules.spec("batch", "seq", "heads", None),
    )(x, axis_indices(head_axes))


def _spread_forward(x, num_heads, rules):
    return _spread(x, num_heads, rules), x


def _spread_backward(num_heads, rules, x, d_y):
    head_axes = rules.mesh_axes("heads")

    def add_shard(x: jax.Array, d_y: jax.Array, device_index: jax.Array) -> jax.Array:
        first, _ = _find_group(x.shape[2], num_heads, rules, device_index)
        d_x = lax.dynamic_update_slice_in_dim(jnp.zeros_like(x), d_y, first, axis=2)
        return lax.psum(d_x, head_axes)

    whole = rules.spec("batch", "seq", None, None)
    d_x = map_shards(
        add_shard,
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
