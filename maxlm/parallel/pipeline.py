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
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from maxlm.parallel.config import Schedule
from maxlm.parallel.local import axis_indices, axis_size, map_shards

STAGE = "stage"
StageFn = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
"""(one group's parameters, x, one micro-batch's context) -> (x, sums to add up)."""


def bubble_ratio(
    schedule: Schedule, stages: int, micro_batches: int, groups: int = 1
) -> float:
    """Returns the share of slots in which a stage is idle."""
    groups = groups if schedule == "circular" else 1
    return (stages - 1) / (micro_batches * groups + stages - 1)


def _circular(tick, stage, stages: int, micro_batches: int, groups: int):
    """(micro-batch, group, whether there is one) of a stage at a tick; NumPy or JAX."""
    turn = tick - stage
    batch, within = turn // (stages * groups), turn % (stages * groups)
    works = (turn >= 0) & (turn < micro_batches * groups)
    return batch * stages + within % stages, within // stages, works


def _backward_turn(tick, stage, stages: int):
    return tick - 2 * (stages - 1) + stage


def _to_next(x: Any, stages: int) -> Any:
    return lax.ppermute(x, STAGE, [(i, (i + 1) % stages) for i in range(stages)])


def _to_previous(x: Any, stages: int) -> Any:
    return lax.ppermute(x, STAGE, [((i + 1) % stages, i) for i in range(stages)])


def _at(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree
    )


def _group(params: Any, group: jax.Array, groups: int) -> Any:
    return params if groups == 1 else _at(params, group)


def _add(totals: Any, terms: Any, counts: jax.Array | bool = True) -> Any:
    if counts is True:
        return jax.tree.map(jnp.add, totals, terms)
    return jax.tree.map(lambda s, p: s + jnp.where(counts, p, 0), totals, terms)


def _add_to_group(total: Any, part: Any, group: jax.Array, groups: int) -> Any:
    if groups == 1:
        return _add(total, part)
    return jax.tree.map(lambda t, p: t.at[group].add(p), total, part)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def run_circular_pipeline(
    stage: StageFn,
    params: Any,
    x: jax.Array,
    context: Any,
    micro_batches: int,
    groups: int = 1,
) -> tuple[jax.Array, Any]:
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


def _specs(groups: int) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns the specs of layers' parameters, of arrays split over stages and of whole
    ones."""
    layers = PartitionSpec(STAGE) if groups == 1 else PartitionSpec(None, STAGE)
    return layers, PartitionSpec(STAGE), PartitionSpec()


def _store(
    slots: jax.Array, value: jax.Array, due: jax.Array, slot: jax.Array
) -> jax.Array:
    """``slots`` with ``value`` in place where it is due; its last slot takes what is
    not."""
    last = slots.shape[0] - 1
    return lax.dynamic_update_index_in_dim(slots, value, jnp.where(due, slot, last), 0)


def _pipeline_forward(stage, params, x, context, micro_batches, groups):
    stages = axis_size((STAGE,))
    layers, split, whole = _specs(groups)
    rounds = stages * groups  # ticks from one batch of micro-batches to the next
    delivered = (
        rounds + stages - 2
    )  # the tick in which the first batch's results are all home

    def run(params, x, context, number):
        own = number[0]
        empty = jnp.zeros_like(x[0])

        def tick(carry, t):
            current, incoming, outgoing, results, sums = carry
            batch = jnp.clip(t // rounds, 0, x.shape[0] - 1)
            incoming = jnp.where(t % rounds == 0, _at(x, batch), incoming)
            micro, group, works = _circular(t, own, stages, micro_batches, groups)
            fresh = (own == 0) & (group == 0)
            given = jnp.where(fresh, incoming, current)
            micro = _place(micro, stages, micro_batches)
            y, part = stage(_group(params, group, groups), given, _at(context, micro))
            sums = _add(sums, part, works)
            outgoing = jnp.where(own == stages - 1, y, outgoing)
            due = (t >= delivered) & ((t - delivered) % rounds == 0)
            results = _store(results, outgoing, due, (t - delivered) // rounds)
            streams = _to_previous(jnp.stack([incoming, outgoing]), stages)
            return (_to_next(y, stages), *streams, results, sums), given

        part = jax.eval_shape(
            stage, _group(params, own, groups), empty, _at(context, own)
        )[1]
        sums = _zeros(part)
        results = jnp.concatenate([jnp.zeros_like(x), empty[None]])
        ticks = jnp.arange(micro_batches * groups + stages - 1)
        carry, given = lax.scan(tick, (empty, empty, empty, results, sums), ticks)
        *_, results, sums = carry
        return results[:-1], lax.psum(sums, STAGE), given[None]

    mapped = map_shards(
        run, (layers, split, whole, split), (split, whole, split), axes=(STAGE,)
    )
    out, sums, given = mapped(params, x, context, axis_indices((STAGE,)))
    return (out, sums), (params, context, given)


def _pipeline_backward(stage, micro_batches, groups, saved, cotangents):
    """The forward tick's lines in reverse order, each transposed."""
    params, context, given = saved
    d_out, d_sums = cotangents
    stages = axis_size((STAGE,))
    layers, split, whole = _specs(groups)
    rounds = stages * groups
    delivered = rounds + stages - 2

    def run(params, context, given, number, d_out, d_sums):
        own, given = number[0], given[0]
        empty = jnp.zeros_like(d_out[0])

        def tick(carry, inputs):
            d_current, d_incoming, d_outgoing, d_x, d_params = carry
            t, given = inputs
            d_y = _to_previous(d_current, stages)
            d_incoming, d_outgoing = _to_next(
                jnp.stack([d_incoming, d_outgoing]), stages
            )
            due = (t >= delivered) & ((t - delivered) % rounds == 0)
            slot = jnp.clip((t - delivered) // rounds, 0, d_out.shape[0] - 1)
            d_outgoing = jnp.where(due, _at(d_out, slot), d_outgoing)
            last = own == stages - 1
            d_y = jnp.where(last, d_y + d_outgoing, d_y)
            d_outgoing = jnp.where(last, 0, d_outgoing)
            micro, group, works = _circular(t, own, stages, micro_batches, groups)
            micro = _place(micro, stages, micro_batches)
            ctx = _at(context, micro)
            _, backward = jax.vjp(
                lambda p, x: stage(p, x, ctx), _group(params, group, groups), given
            )
            d_part = jax.tree.map(lambda d: jnp.where(works, d, 0), d_sums)
            part, d_given = backward((jnp.where(works, d_y, 0), d_part))
            d_params = _add_to_group(d_params, part, group, groups)
            fresh = (own == 0) & (group == 0)
            d_incoming = jnp.where(fresh, d_incoming + d_given, d_incoming)
            d_x = _store(d_x, d_incoming, t % rounds == 0, t // rounds)
            d_incoming = jnp.where(t % rounds == 0, 0, d_incoming)
            carry = (
                jnp.where(fresh, 0, d_given),
                d_incoming,
                d_outgoing,
                d_x,
                d_params,
            )
            return carry, None

        d_x = jnp.concatenate([jnp.zeros_like(d_out), empty[None]])
        d_params = jax.tree.map(jnp.zeros_like, params)
        ticks = jnp.arange(micro_batches * groups + stages - 1)
        start = (empty, empty, empty, d_x, d_params)
        (*_, d_x, d_params), _ = lax.scan(tick, start, (ticks, given), reverse=True)
        return d_params, d_x[:-1]

    specs = (layers, whole, split, split, split, whole), (layers, split)
    mapped = map_shards(run, *specs, axes=(STAGE,))
    return *mapped(params, context, given, axis_indices((STAGE,)), d_out, d_sums), None


run_circular_pipeline.defvjp(_pipeline_forward, _pipeline_backward)


def _place(micro: jax.Array, stages: int, micro_batches: int) -> jax.Array:
    """The position in [M, ...] of the ``micro``-th micro-batch that is worked on.

    Stage i holds M/S of them in a row, and each round takes one from every stage.
    """
    micro = jnp.clip(micro, 0, micro_batches - 1)
    return micro % stages * (micro_batches // stages) + micro // stages


def run_1f1b_pipeline(
    first: Callable[[Any, Any], tuple[jax.Array, Any]],
    stage: StageFn,
    last: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    first_last_params: Any,
    params: Any,
    batch: Any,
    *,
    sums_cotangent: Callable[[Any], Any],
) -> tuple[tuple[jax.Array, Any, Any], tuple[Any, Any]]:
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
    layers, split, whole = _specs(1)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    kept = 2 * stages - 1

    def run(ends, params, batch, number):
        own = number[0]
        is_last = own == stages - 1

        def micro(turn):
            return _at(batch, jnp.clip(turn, 0, micro_batches - 1))

        def forward(t, state):
            """One forward pass: what is kept, and what goes to the next stage."""
            turn = t - own
            x, context = first(ends, micro(turn))
            x = jnp.where(own == 0, x, state["x"])
            y, part = stage(params, x, context)
            works = (turn >= 0) & (turn < micro_batches)
            inputs = lax.dynamic_update_index_in_dim(state["inputs"], x, turn % kept, 0)
            return y, state | {
                "inputs": inputs,
                "parts": _add(state["parts"], part, works),
            }

        def backward(t, y, state):
            """One backward pass; on the last stage, of the micro-batch just seen."""
            turn = _backward_turn(t, own, stages)
            works = (turn >= 0) & (turn < micro_batches)
            ours = micro(turn)
            if y is None:
                d_y = state["d_y"]
            else:
                (loss, sums), pull = jax.vjp(lambda e, y: last(e, y, ours), ends, y)
                counts = works & is_last
                nothing = jax.tree.map(jnp.zeros_like, sums)
                d_ends, d_last = pull(
                    (jnp.where(counts, 1.0, 0.0).astype(loss.dtype), nothing)
                )
                d_y = jnp.where(is_last, d_last, state["d_y"])
                state |= {
                    "totals": _add(state["totals"], (loss, sums), counts),
                    "d_ends": _add(state["d_ends"], d_ends),
                }
            (_, context), pull_first = jax.vjp(lambda e: first(e, ours), ends)
            # A stage without a turn may take anything; `d_y` has this pass wait for the
            # forward one and the loss. XLA:CPU would run them side by side, and virtual
            # devices then wait for each other for good, one in this pass's collectives
            # and one in the others'.
            given = jnp.where(works, _at(state["inputs"], turn % kept), d_y)
            (_, part), pull = jax.vjp(lambda p, x: stage(p, x, context), params, given)
            d_part = jax.tree.map(
                lambda d: jnp.where(works, d, 0), sums_cotangent(part)
            )
            d_params, d_x = pull((jnp.where(works, d_y, 0), d_part))
            none = jax.tree.map(_no_gradient, context)
            (d_ends,) = pull_first((jnp.where(own == 0, d_x, 0), none))
            sums = _add((state["d_params"], state["d_ends"]), (d_params, d_ends))
            return d_x, state | dict(zip(("d_params", "d_ends"), sums, strict=True))

        def warm_up(state, t):
            y, state = forward(t, state)
            return state | {"x": _to_next(y, stages)}, None

        def steady(state, t):
            y, state = forward(t, state)
            d_x, state = backward(t, y, state)
            return state | {
                "x": _to_next(y, stages),
                "d_y": _to_previous(d_x, stages),
            }, None

        def cool_down(state, t):
            d_x, state = backward(t, None, state)
            return state | {"d_y": _to_previous(d_x, stages)}, None

        x, context = first(ends, micro(own))
        _, part = jax.eval_shape(stage, params, x, context)
        totals = jax.eval_shape(last, ends, x, micro(own))
        empty = jnp.zeros_like(x)
        state = {
            "x": empty,
            "d_y": empty,
            "inputs": jnp.stack([empty] * kept),
            "parts": _zeros(part),
            "totals": _zeros(totals),
            "d_ends": jax.tree.map(jnp.zeros_like, ends),
            "d_params": jax.tree.map(jnp.zeros_like, params),
        }
        bounds = (
            stages - 1,
            micro_batches + stages - 1,
            micro_batches + 2 * (stages - 1),
        )
        state, _ = lax.scan(warm_up, state, jnp.arange(bounds[0]))
        state, _ = lax.scan(steady, state, jnp.arange(bounds[0], bounds[1]))
        state, _ = lax.scan(cool_down, state, jnp.arange(bounds[1], bounds[2]))
        totals, parts, d_ends = lax.psum(
            (state["totals"], state["parts"], state["d_ends"]), STAGE
        )
        return totals, parts, d_ends, state["d_params"]

    specs = (whole, layers, whole, split), (whole, whole, whole, layers)
    mapped = map_shards(run, *specs, axes=(STAGE,))
    own = axis_indices((STAGE,))
    totals, parts, d_ends, d_params = mapped(first_last_params, params, batch, own)
    return (*totals, parts), (d_ends, d_params)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _no_gradient(x: jax.Array) -> Any:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if is_float else np.zeros(x.shape, jax.dtypes.float0)
