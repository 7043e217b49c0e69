"""Collectives of linear maps, norms and attention: the table in ``parallel/linear.py``, counted."""

from collections.abc import Iterator

import numpy as np

from maxlm.plan.communication.collective import FP32, PASSES, Phase, PlannedCollective
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import Kernel, Map, Pairs
from maxlm.plan.workload import Number


def list_layer_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split = shape.work, shape.split
    for map_ in work.maps:
        if not map_.experts:
            yield from _map(shape, map_, *count_passes(shape, map_.depth))
    for pairs in work.pairs:
        yield from _attention(shape, pairs, *count_passes(shape, pairs.layers))
    _, runs = count_passes(shape, work.layers)
    vectors = [s for s in work.layer_specs.values() if s.role == "vector" and not s.sign_update]
    size = sum(s.size for s in vectors) / work.layers * FP32
    axes = (*split.compute.batch, *split.compute.residual)
    yield PlannedCollective("norms: gradients", "all-reduce", axes, size, runs, "backward", False)


def count_passes(shape: StepShape, layers: Number) -> tuple[Number, Number]:
    """Forward and backward passes of single layers in a step, of so many in all: a pipeline's
    backward pass runs a stage forward once more, to differentiate it."""
    runs = shape.slots * shape.held(layers)
    return runs * np.where(shape.pipelined, 2, 1), runs


def _map(
    shape: StepShape, map_: Map, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    """Lists those of a layer's map; see the table in ``parallel/linear.py``."""
    work, rules = shape.work, shape.split.compute
    tokens = shape.tokens * map_.rate * work.dtype_bytes
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    again = backward if shape.remat != "none" and work.ends_wanted(map_) else 0
    for kernel in map_.kernels:
        yield from list_weight_collectives(
            shape, kernel, forward, backward, (*rules.batch, *rules.seq)
        )
    sides = {
        "in": {a for k in map_.kernels for x in k.axes[: k.inputs] for a in rules.mesh_axes(x)},
        "out": {a for k in map_.kernels for x in k.axes[k.inputs :] for a in rules.mesh_axes(x)},
    }
    summed, spread = (tuple(sorted(sides[side])) for side in ("in", "out"))

    def moved(what: str, kind: str, axes: tuple[str, ...], runs: Number, phase: Phase):
        width = work.config.model.d_model if map_.reads != "latent" else map_.width
        return PlannedCollective(
            f"{map_.name}: {what}", kind, axes, tokens * width, runs, phase, True
        )

    beside, once = work.beside_attention(map_), shape.slots
    # The compiler gathers the same array once: what both branches read, or all layers.
    shared = beside and work.config.model.placement == "parallel_shared"
    if map_.reads == "latent":
        yield moved("its gradient", "all-reduce", spread, backward, "backward")
    if map_.reads == "memory":
        yield moved("input", "all-gather", sequence, once, "forward")
    if map_.reads == "residual" and not shared:
        yield moved("input", "all-gather", sequence, forward, "forward")
        yield moved("input", "all-gather", sequence, backward, "backward")
    if map_.reads in ("residual", "memory"):
        yield moved("its gradient", "reduce-scatter", sequence, backward, "backward")
        rest = tuple(axis for axis in spread if axis not in sequence)
        yield moved("its gradient", "all-reduce", rest, backward, "backward")
    if map_.writes == "residual":
        yield moved("output", "reduce-scatter", sequence, forward, "forward")
        yield moved("output", "reduce-scatter", sequence, again, "backward")
        gathers = 0 if beside else backward
        yield moved("its gradient", "all-gather", sequence, gathers, "backward")
        rest = tuple(axis for axis in summed if axis not in sequence)
        yield moved("output", "all-reduce", rest, forward, "forward")
        yield moved("output", "all-reduce", rest, again, "backward")


def list_weight_collectives(
    shape: StepShape, kernel: Kernel, forward: Number, backward: Number, token_axes: tuple[str, ...]
) -> Iterator[PlannedCollective]:
    """Kernels gathered from storage, and their gradients reduced into it.

    Under ZeRO-2 kernels are at hand whole, and gradients go to shares of their own; but experts',
    and all of a 1F1B pipeline, are gathered from such shares too.
    """
    split, itemsize = shape.split, shape.work.dtype_bytes
    used = kernel.size * itemsize / split.shards(split.compute, kernel.axes)
    name = kernel.name
    scattered, here = split.extra(split.gradients, kernel), 1.0
    if split.gradients != split.storage and "expert" not in kernel.axes:
        one_f_one_b = shape.work.config.parallel.schedule == "1f1b"
        here = np.where(shape.pipelined & one_f_one_b, 1.0, 0.0)
    yield PlannedCollective(name, "all-gather", scattered, used, here * forward, "forward", False)
    yield PlannedCollective(name, "all-gather", scattered, used, here * backward, "backward", False)
    rest = tuple(axis for axis in token_axes if axis not in scattered)
    what = f"{name}: gradient"
    yield PlannedCollective(what, "reduce-scatter", scattered, used, backward, "backward", False)
    left = used / split.ways(scattered)
    yield PlannedCollective(what, "all-reduce", rest, left, backward, "backward", False)


def _attention(
    shape: StepShape, pairs: Pairs, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    """Lists those of a sequence split over devices, and of kv heads that are whole on several."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    heads, axes = pairs.heads, shape.split.compute.seq
    kv_axes = rules.mesh_axes(heads.kv_axis)
    ways, kv_ways = split.ways(axes), split.ways(kv_axes)
    query_heads = heads.num_heads / split.ways(rules.heads)
    kv_heads = heads.num_kv_heads / kv_ways
    tokens, value = shape.tokens * pairs.rate, heads.value_dim
    head = tokens * heads.head_dim
    # Of a key and its value, or a query and its output, each.
    either = tokens * (heads.head_dim + value) / 2
    itemsize, again = work.dtype_bytes, 0
    if work.attention_recomputed(shape.remat):
        again = backward
    # Each device takes those kv heads that its query heads read.
    read = np.minimum(kv_heads, np.maximum(kv_heads * kv_ways / split.ways(rules.heads), 1))

    def moved(what: str, kind: str, whole: Number, runs: Number, phase: Phase):
        return PlannedCollective(f"attention: {what}", kind, axes, whole, runs, phase, True)

    method = work.config.parallel.context
    if method == "all_gather":
        whole = either * read * ways
        yield moved("keys and values", "all-gather", whole * itemsize, 2 * forward, "forward")
        yield moved("keys and values", "all-gather", whole * itemsize, 2 * backward, "backward")
        yield moved("their gradients", "reduce-scatter", whole * FP32, 2 * backward, "backward")
    elif method == "ring":
        block, steps = either * read, _steps(shape, pairs, ways)
        yield moved(
            "keys and values",
            "collective-permute",
            block * itemsize,
            2 * steps * forward,
            "forward",
        )
        yield moved(
            "keys and values",
            "collective-permute",
            block * itemsize,
            2 * steps * (backward + again),
            "backward",
        )
        yield moved(
            "their gradients",
            "collective-permute",
            block * FP32,
            2 * np.where(np.greater(steps, 0), steps + 1, 0) * backward,
            "backward",
        )
    else:
        shared = np.gcd(np.asarray(np.maximum(read, 1), int), np.asarray(ways, int))
        copies = ways / shared
        keys = either * read * copies
        queries, output = head * query_heads * itemsize, tokens * value * query_heads * itemsize
        for runs, phase in zip((forward, backward), PASSES, strict=True):
            yield moved("queries", "all-to-all", queries, runs, phase)
            yield moved("keys and values", "all-to-all", keys * itemsize, 2 * runs, phase)
        yield moved("output", "all-to-all", output, forward + again, "forward")
        gradients = (queries + output) / 2
        yield moved("gradients", "all-to-all", gradients, 2 * backward, "backward")
        wire = np.where(np.greater(copies, 1), FP32, itemsize)
        yield moved(
            "gradients of keys and values", "all-to-all", keys * wire, 2 * backward, "backward"
        )
    if heads.shared_dim:
        shared = tokens * heads.shared_dim * itemsize
        yield PlannedCollective(
            *("attention: shared keys' gradient", "all-reduce", rules.heads, shared),
            *(backward, "backward", True),
        )
    if rules.heads and not kv_axes:
        # What blocks add up is in fp32; attention of a whole sequence gives its own dtype.
        wire = np.where(np.greater(ways, 1) & (method != "ulysses"), FP32, itemsize)
        whole = either * heads.num_kv_heads * wire * pairs.keys / pairs.queries
        yield PlannedCollective(
            *("whole kv heads: gradients", "all-reduce", rules.heads, whole),
            *(2 * backward, "backward", True),
        )


def _steps(shape: StepShape, pairs: Pairs, ways: Number) -> Number:
    """Turns of a ring in which keys come from another device (``parallel/context.py``)."""
    if pairs.window is None or shape.work.config.parallel.balance_sequence:
        return ways - 1
    rows = pairs.queries / ways
    return np.minimum(ways - 1, np.floor((pairs.window + rows - 2) / rows))
