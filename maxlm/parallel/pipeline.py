"""Pipeline schedules over the mesh axis `stage`.

A device of stage i holds some of the layers and every tick runs them on one
micro-batch; between ticks activations move to the next stage by a collective-permute,
gradients to the one before. Time is counted in ticks of one stage's (circular: one
layer group's) forward or backward pass.

Circular, two stages, two groups of layers, four micro-batches (``m.g``: micro-batch m,
group g); one group a stage is GPipe::

    tick      0    1    2    3    4    5    6    7    8
    stage 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1   ·
    stage 1   ·   0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

Micro-batches go round in batches of as many as there are stages, so that each comes
back to stage 0 in the tick after it left the last stage, and nothing waits in between.
The backward pass is the same table read from right to left. Of M·G + S − 1 ticks a
stage works M·G: the bubble is (S − 1) / (M·G + S − 1).

1F1B, three stages, four micro-batches (``m``: forward, ``m'``: backward)::

    tick      0    1    2       3       4       5       6    7
    stage 0   0    1    2       3    ·  0'   ·  1'      2'   3'
    stage 1   ·    0    1    ·  2    0' 3    1' ·   2'  3'   ·
    stage 2   ·    ·    0 0'    1 1'    2 2'    3 3'    ·    ·

Every stage may do a forward and a backward in one tick, so that forward passes need not
wait for the slower backward ones next door. The first S − 1 ticks have no backward
anywhere and the last S − 1 no forward; they are scans of their own and do not pay for
what they lack. Stage i keeps its inputs of 2(S − 1 − i) + 1 micro-batches, however many
there are. Both kinds of pass take M + S − 1 slots, of which a stage works M: the bubble
is GPipe's, (S − 1) / (M + S − 1).

Letters: S stages, G layer groups of a stage, M micro-batches, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from maxlm.parallel.config import Schedule
from maxlm.parallel.local import axis_indices, axis_size, map_shards

STAGE = "stage"
PyTree = Any
"""A tree of arrays."""
StageFn = Callable[[PyTree, jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree]]
"""(one group's parameters, x, one micro-batch's context, the group's number among those
of all stages in the model's order) -> (x, sums to add up)."""


def bubble_ratio(
    schedule: Schedule, stages: int, micro_batches: int, groups: int = 1
) -> float:
    """Returns the share of slots in which a stage is idle."""
    groups = groups if schedule == "circular" else 1
    return (stages - 1) / (micro_batches * groups + stages - 1)


class _Turn(NamedTuple):
    """What a stage does in a tick."""

    micro_batch: jax.Array
    group: jax.Array
    works: jax.Array
    """bool, whether there is anything; the others mean nothing where not."""


def _circular_turn(
    tick: jax.Array, stage: jax.Array, stages: int, micro_batches: int, groups: int
) -> _Turn:
    """Returns a stage's turn at a tick, read off the table at the top of this module: a
    round of as many micro-batches as stages runs group 0 of each, then group 1."""
    # Turns since the stage's first micro-batch came, in tick ``stage``.
    turn = tick - stage
    round_ticks = stages * groups
    micro_batch_round = turn // round_ticks
    within_round = turn % round_ticks
    works = (turn >= 0) & (turn < micro_batches * groups)
    micro_batch = micro_batch_round * stages + within_round % stages
    group = within_round // stages
    return _Turn(micro_batch, group, works)


def _backward_turn(tick: jax.Array, stage: jax.Array, stages: int) -> jax.Array:
    """Returns the micro-batch whose backward pass a stage runs at a tick of 1F1B.

    Micro-batch 0 takes S − 1 ticks to the last stage, which begins its backward pass in
    the same tick, and S − 1 − stage ticks back to this one.
    """
    return tick - 2 * (stages - 1) + stage


def _send_to_next(x: PyTree, stages: int) -> PyTree:
    """Sends everything to the next stage; the last stage's goes to the first."""
    sender_and_receiver = [(i, (i + 1) % stages) for i in range(stages)]
    return lax.ppermute(x, STAGE, sender_and_receiver)


def _send_to_previous(x: PyTree, stages: int) -> PyTree:
    """Sends everything to the stage before; the first stage's goes to the last."""
    sender_and_receiver = [((i + 1) % stages, i) for i in range(stages)]
    return lax.ppermute(x, STAGE, sender_and_receiver)


def _take(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree
    )


def _take_group(params: PyTree, group: jax.Array, groups: int) -> PyTree:
    """Returns one layer group's parameters; with one group there is no such axis."""
    return params if groups == 1 else _take(params, group)


def _add(totals: PyTree, terms: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, totals, terms)


def _add_where(counts: jax.Array, totals: PyTree, terms: PyTree) -> PyTree:
    return jax.tree.map(
        lambda total, term: total + jnp.where(counts, term, 0), totals, terms
    )


def _add_to_group(
    totals: PyTree, terms: PyTree, group: jax.Array, groups: int
) -> PyTree:
    if groups == 1:
        return _add(totals, terms)
    return jax.tree.map(lambda total, term: total.at[group].add(term), totals, terms)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def run_circular_pipeline(
    stage: StageFn,
    params: PyTree,
    x: jax.Array,
    context: PyTree,
    micro_batches: int,
    groups: int = 1,
) -> tuple[jax.Array, PyTree]:
    """Runs all layers over all micro-batches by the circular schedule (GPipe for one
    group); reverse-mode differentiable in ``params`` and ``x``.

    Micro-batches lie spread over the stages before and after, so that what comes before
    the layers and after them is data-parallel over stages too. Two more streams carry
    them: inputs towards stage 0, which takes one a tick, and results from the last
    stage back to where they belong. A stage's own activations are computed again in the
    backward pass, from its input.

    Args:
        params: the layers', [L, ...] split over `stage`; for several groups
            [groups, L/groups, ...], split in the second dimension.
        x: [M, ...], M micro-batches split over `stage`, of which it is a multiple.
        context: arrays [M, ...], whole over `stage`; no gradient.

    Returns:
        x after all layers, laid out as before; and the stages' sums, added up over
        stages and micro-batches.
    """
    return _pipeline_forward(stage, params, x, context, micro_batches, groups)[0]


def _make_specs(groups: int) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns the specs of layers' parameters, of arrays split over stages and of whole
    ones."""
    layers = PartitionSpec(STAGE) if groups == 1 else PartitionSpec(None, STAGE)
    return layers, PartitionSpec(STAGE), PartitionSpec()


def _store_if_due(
    slots: jax.Array, value: jax.Array, is_due: jax.Array, slot: jax.Array
) -> jax.Array:
    """Returns ``slots`` with ``value`` in place where it is due; the last slot takes
    what is not."""
    last_slot = slots.shape[0] - 1
    slot = jnp.where(is_due, slot, last_slot)
    return lax.dynamic_update_index_in_dim(slots, value, slot, 0)


class _CircularTiming(NamedTuple):
    """Ticks of the streams that bring inputs to stage 0 and results home."""

    round_ticks: int
    """From one round of micro-batches, as many as stages, to the next."""
    first_delivery: int
    """The tick in which the first round's results are all home."""
    num_ticks: int

    def is_round_start(self, tick: jax.Array) -> jax.Array:
        return tick % self.round_ticks == 0

    def is_delivery(self, tick: jax.Array) -> jax.Array:
        return (tick >= self.first_delivery) & (
            (tick - self.first_delivery) % self.round_ticks == 0
        )

    def find_delivery_slot(self, tick: jax.Array) -> jax.Array:
        """Returns the round whose results come home."""
        return (tick - self.first_delivery) // self.round_ticks


def _time_circular(stages: int, micro_batches: int, groups: int) -> _CircularTiming:
    round_ticks = stages * groups
    return _CircularTiming(
        round_ticks,
        first_delivery=round_ticks + stages - 2,
        num_ticks=micro_batches * groups + stages - 1,
    )


def _pipeline_forward(stage, params, x, context, micro_batches, groups):
    stages = axis_size((STAGE,))
    layers, split, whole = _make_specs(groups)
    timing = _time_circular(stages, micro_batches, groups)

    def run(params, x, context, stage_indices):
        stage_index = stage_indices[0]
        empty = jnp.zeros_like(x[0])

        def tick(carry, t):
            # A stage's next input, the two streams that pass through it, its results
            # and its layers' sums.
            current, incoming, outgoing, results, sums = carry

            # Every stage puts one of its inputs into the stream at a round's begin.
            input_slot = jnp.clip(t // timing.round_ticks, 0, x.shape[0] - 1)
            incoming = jnp.where(
                timing.is_round_start(t), _take(x, input_slot), incoming
            )

            # Run this turn's layers. Stage 0 takes group 0's input from the stream.
            micro_batch, group, works = _circular_turn(
                t, stage_index, stages, micro_batches, groups
            )
            is_fresh = (stage_index == 0) & (group == 0)
            stage_input = jnp.where(is_fresh, incoming, current)
            place = _find_place(micro_batch, stages, micro_batches)
            group_params = _take_group(params, group, groups)
            number = group * stages + stage_index
            y, terms = stage(group_params, stage_input, _take(context, place), number)
            sums = _add_where(works, sums, terms)

            # The last stage puts its output into the stream home, from which every
            # stage stores its own when a round is due.
            outgoing = jnp.where(stage_index == stages - 1, y, outgoing)
            is_due = timing.is_delivery(t)
            result_slot = timing.find_delivery_slot(t)
            results = _store_if_due(results, outgoing, is_due, result_slot)

            # Both streams in one collective.
            streams = _send_to_previous(jnp.stack([incoming, outgoing]), stages)
            carry = (_send_to_next(y, stages), *streams, results, sums)
            return carry, stage_input

        first_group = _take_group(params, stage_index, groups)
        _, terms = jax.eval_shape(
            stage, first_group, empty, _take(context, stage_index), stage_index
        )
        sums = _make_zeros(terms)
        # The last slot is for what is not due.
        results = jnp.concatenate([jnp.zeros_like(x), empty[None]])
        ticks = jnp.arange(timing.num_ticks)
        start = (empty, empty, empty, results, sums)
        carry, stage_inputs = lax.scan(tick, start, ticks)
        *_, results, sums = carry
        return results[:-1], lax.psum(sums, STAGE), stage_inputs[None]

    run_stages = map_shards(
        run, (layers, split, whole, split), (split, whole, split), axes=(STAGE,)
    )
    out, sums, stage_inputs = run_stages(params, x, context, axis_indices((STAGE,)))
    return (out, sums), (params, context, stage_inputs)


def _pipeline_backward(stage, micro_batches, groups, saved, cotangents):
    """The forward tick's lines in reverse order, each transposed."""
    params, context, stage_inputs = saved
    d_out, d_sums = cotangents
    stages = axis_size((STAGE,))
    layers, split, whole = _make_specs(groups)
    timing = _time_circular(stages, micro_batches, groups)

    def run(params, context, stage_inputs, stage_indices, d_out, d_sums):
        stage_index = stage_indices[0]
        stage_inputs = stage_inputs[0]
        empty = jnp.zeros_like(d_out[0])

        def tick(carry, inputs):
            d_current, d_incoming, d_outgoing, d_x, d_params = carry
            t, stage_input = inputs

            # The collectives, turned round.
            d_y = _send_to_previous(d_current, stages)
            d_incoming, d_outgoing = _send_to_next(
                jnp.stack([d_incoming, d_outgoing]), stages
            )

            # A result that was stored has its gradient, which the last stage takes out
            # of the stream.
            is_due = timing.is_delivery(t)
            slot = jnp.clip(timing.find_delivery_slot(t), 0, d_out.shape[0] - 1)
            d_outgoing = jnp.where(is_due, _take(d_out, slot), d_outgoing)
            is_last = stage_index == stages - 1
            d_y = jnp.where(is_last, d_y + d_outgoing, d_y)
            d_outgoing = jnp.where(is_last, 0, d_outgoing)

            # The turn's layers: run again from their input, and pulled back.
            micro_batch, group, works = _circular_turn(
                t, stage_index, stages, micro_batches, groups
            )
            place = _find_place(micro_batch, stages, micro_batches)
            tick_context = _take(context, place)
            number = group * stages + stage_index
            _, pull = jax.vjp(
                lambda p, x: stage(p, x, tick_context, number),
                _take_group(params, group, groups),
                stage_input,
            )
            d_terms = jax.tree.map(lambda d: jnp.where(works, d, 0), d_sums)
            d_group, d_input = pull((jnp.where(works, d_y, 0), d_terms))
            d_params = _add_to_group(d_params, d_group, group, groups)

            # The input came from the stream (at stage 0, group 0) or from the stage
            # before; and the stream from a stage's own inputs at a round's begin.
            is_fresh = (stage_index == 0) & (group == 0)
            d_incoming = jnp.where(is_fresh, d_incoming + d_input, d_incoming)
            d_x = _store_if_due(
                d_x, d_incoming, timing.is_round_start(t), t // timing.round_ticks
            )
            d_incoming = jnp.where(timing.is_round_start(t), 0, d_incoming)
            d_current = jnp.where(is_fresh, 0, d_input)
            return (d_current, d_incoming, d_outgoing, d_x, d_params), None

        d_x = jnp.concatenate([jnp.zeros_like(d_out), empty[None]])
        d_params = jax.tree.map(jnp.zeros_like, params)
        ticks = jnp.arange(timing.num_ticks)
        start = (empty, empty, empty, d_x, d_params)
        carry, _ = lax.scan(tick, start, (ticks, stage_inputs), reverse=True)
        *_, d_x, d_params = carry
        return d_params, d_x[:-1]

    run_stages = map_shards(
        run,
        (layers, whole, split, split, split, whole),
        (layers, split),
        axes=(STAGE,),
    )
    d_params, d_x = run_stages(
        params, context, stage_inputs, axis_indices((STAGE,)), d_out, d_sums
    )
    return d_params, d_x, None


run_circular_pipeline.defvjp(_pipeline_forward, _pipeline_backward)


def _find_place(micro_batch: jax.Array, stages: int, micro_batches: int) -> jax.Array:
    """Returns the position in [M, ...] of a micro-batch, numbered in the order in which
    they are worked on.

    Stage i holds M/S of them in a row, and each round takes one from every stage.
    """
    micro_batch = jnp.clip(micro_batch, 0, micro_batches - 1)
    per_stage = micro_batches // stages
    first_of_stage = micro_batch % stages * per_stage
    return first_of_stage + micro_batch // stages


class _State1F1B(NamedTuple):
    """What a stage has between ticks."""

    d_ends: PyTree
    d_params: PyTree
    d_y: jax.Array
    """Gradient from the next stage, of its last tick."""
    inputs: jax.Array
    """[slots, ...]: inputs whose backward pass is to come; micro-batch m is in slot m
    mod slots."""
    sums: PyTree
    """The layers' sums."""
    totals: PyTree
    """Loss and sums of ``last``."""
    x: jax.Array
    """Input from the stage before, of its last tick."""


def run_1f1b_pipeline(
    first: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    stage: StageFn,
    last: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, PyTree]],
    first_last_params: PyTree,
    params: PyTree,
    batch: PyTree,
    *,
    sums_cotangent: Callable[[PyTree], PyTree],
) -> tuple[tuple[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Computes loss and gradients by the 1F1B schedule.

    Args:
        first: (ends, one micro-batch) -> (input of the first layer, context of all
            layers).
        stage: as in :func:`run_circular_pipeline`.
        last: (ends, output of the last layer, one micro-batch) -> (loss, sums to log).
        first_last_params: parameters of ``first`` and ``last``, whole over `stage`.
        params: the layers', [L, ...] split over `stage`.
        batch: arrays [M, ...], whole over `stage`.
        sums_cotangent: the loss's derivative in a stage's sums (of their shapes).

    Returns:
        ((loss, sums of ``last``, of ``stage``), each added up over micro-batches and
        stages), (gradients of ``first_last_params``, of ``params``).
    """
    stages = axis_size((STAGE,))
    layers, split, whole = _make_specs(1)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    # Inputs that stage 0 keeps: it runs 2(S − 1) forward passes more before a
    # micro-batch's own backward pass. Later stages keep fewer, in as many slots.
    num_slots = 2 * stages - 1

    def run(ends, params, batch, stage_indices):
        stage_index = stage_indices[0]
        is_last = stage_index == stages - 1

        def take_micro_batch(turn: jax.Array) -> PyTree:
            return _take(batch, jnp.clip(turn, 0, micro_batches - 1))

        def forward(t: jax.Array, state: _State1F1B) -> tuple[jax.Array, _State1F1B]:
            """Runs one forward pass; returns what goes to the next stage."""
            turn = t - stage_index
            x, context = first(ends, take_micro_batch(turn))
            x = jnp.where(stage_index == 0, x, state.x)
            y, terms = stage(params, x, context, stage_index)
            works = (turn >= 0) & (turn < micro_batches)
            inputs = lax.dynamic_update_index_in_dim(
                state.inputs, x, turn % num_slots, 0
            )
            sums = _add_where(works, state.sums, terms)
            return y, state._replace(inputs=inputs, sums=sums)

        def backward_last(
            works: jax.Array, y: jax.Array, micro_batch: PyTree, state: _State1F1B
        ) -> tuple[jax.Array, _State1F1B]:
            """Runs ``last`` and its backward pass; returns the gradient of this stage's
            output, which on all but the last stage is the next one's."""
            totals, pull = jax.vjp(lambda e, y: last(e, y, micro_batch), ends, y)
            loss, sums = totals
            counts = works & is_last
            d_sums = jax.tree.map(jnp.zeros_like, sums)
            d_loss = jnp.where(counts, 1.0, 0.0).astype(loss.dtype)
            d_ends, d_y = pull((d_loss, d_sums))
            d_y = jnp.where(is_last, d_y, state.d_y)
            totals = _add_where(counts, state.totals, totals)
            d_ends = _add(state.d_ends, d_ends)
            return d_y, state._replace(totals=totals, d_ends=d_ends)

        def backward(
            t: jax.Array, y: jax.Array | None, state: _State1F1B
        ) -> tuple[jax.Array, _State1F1B]:
            """Runs one backward pass; on the last stage, of the micro-batch whose
            forward pass has just given y (None: there was none)."""
            turn = _backward_turn(t, stage_index, stages)
            works = (turn >= 0) & (turn < micro_batches)
            micro_batch = take_micro_batch(turn)
            d_y = state.d_y
            if y is not None:
                d_y, state = backward_last(works, y, micro_batch, state)
            (_, context), pull_first = jax.vjp(lambda e: first(e, micro_batch), ends)
            # A stage without a turn may take anything; `d_y` has this pass wait for the
            # forward one and the loss. XLA:CPU would run them side by side, and virtual
            # devices then wait for each other for good, one in this pass's collectives
            # and one in the others'.
            x = jnp.where(works, _take(state.inputs, turn % num_slots), d_y)
            (_, terms), pull = jax.vjp(
                lambda p, x: stage(p, x, context, stage_index), params, x
            )
            d_sums = sums_cotangent(terms)
            d_terms = jax.tree.map(lambda d: jnp.where(works, d, 0), d_sums)
            d_params, d_x = pull((jnp.where(works, d_y, 0), d_terms))
            d_context = jax.tree.map(_no_gradient, context)
            # Stage 0 alone had its input from ``first``.
            d_first = jnp.where(stage_index == 0, d_x, 0)
            (d_ends,) = pull_first((d_first, d_context))
            d_params = _add(state.d_params, d_params)
            d_ends = _add(state.d_ends, d_ends)
            return d_x, state._replace(d_params=d_params, d_ends=d_ends)

        def warm_up(state: _State1F1B, t: jax.Array) -> tuple[_State1F1B, None]:
            y, state = forward(t, state)
            return state._replace(x=_send_to_next(y, stages)), None

        # Forward before backward: the last stage turns round in the same tick.
        def steady(state: _State1F1B, t: jax.Array) -> tuple[_State1F1B, None]:
            y, state = forward(t, state)
            d_x, state = backward(t, y, state)
            x = _send_to_next(y, stages)
            return state._replace(x=x, d_y=_send_to_previous(d_x, stages)), None

        def cool_down(state: _State1F1B, t: jax.Array) -> tuple[_State1F1B, None]:
            d_x, state = backward(t, None, state)
            return state._replace(d_y=_send_to_previous(d_x, stages)), None

        micro_batch = take_micro_batch(stage_index)
        x, context = first(ends, micro_batch)
        _, terms = jax.eval_shape(stage, params, x, context, stage_index)
        totals = jax.eval_shape(last, ends, x, take_micro_batch(stage_index))
        empty = jnp.zeros_like(x)
        state = _State1F1B(
            x=empty,
            d_y=empty,
            inputs=jnp.stack([empty] * num_slots),
            sums=_make_zeros(terms),
            totals=_make_zeros(totals),
            d_ends=jax.tree.map(jnp.zeros_like, ends),
            d_params=jax.tree.map(jnp.zeros_like, params),
        )
        # Ticks without a backward pass anywhere, with both, and without a forward one.
        first_backward = stages - 1
        forward_end = micro_batches + stages - 1
        backward_end = micro_batches + 2 * (stages - 1)
        state, _ = lax.scan(warm_up, state, jnp.arange(first_backward))
        state, _ = lax.scan(steady, state, jnp.arange(first_backward, forward_end))
        state, _ = lax.scan(cool_down, state, jnp.arange(forward_end, backward_end))
        totals, sums, d_ends = lax.psum((state.totals, state.sums, state.d_ends), STAGE)
        return totals, sums, d_ends, state.d_params

    run_stages = map_shards(
        run,
        (whole, layers, whole, split),
        (whole, whole, whole, layers),
        axes=(STAGE,),
    )
    totals, sums, d_ends, d_params = run_stages(
        first_last_params, params, batch, axis_indices((STAGE,))
    )
    loss, last_sums = totals
    return (loss, last_sums, sums), (d_ends, d_params)


def _make_zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _no_gradient(x: jax.Array) -> jax.Array | np.ndarray:
    """Returns the cotangent of what has no gradient, as ``jax.vjp`` takes it."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
