"""Collectives of linear maps, norms and attention: the table in ``parallel/linear.py``, counted."""

from collections.abc import Iterator

import numpy as np

from maxlm.plan.network import PASSES, Phase, PlannedCollective
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import AttentionShape, Kernel, MatmulGroup
from maxlm.plan.workload import FP32, Number


def list_layer_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, compute = shape.work, shape.split.compute
    for group, layers in work.matmuls.items():
        if not group.has_experts:
            yield from _list_matmul_collectives(shape, group, *count_passes(shape, layers))
    for attention, layers in work.attention.items():
        yield from _list_attention_collectives(shape, attention, *count_passes(shape, layers))
    _, runs = count_passes(shape, work.layers)
    vectors = (s for s in work.specs.values() if s.lead and s.role == "vector")
    size = sum(s.size for s in vectors if not s.sign_update) / work.layers * FP32
    axes = (*compute.batch, *compute.residual)
    yield PlannedCollective("norms: gradients", "all-reduce", axes, size, runs, "backward", False)


def count_passes(shape: StepShape, layers: Number) -> tuple[Number, Number]:
    """Forward and backward passes of single layers in a step, of so many in all: a pipeline's
    backward pass runs a stage forward once more, to differentiate it."""
    runs = shape.slots * shape.held(layers)
    return runs * np.where(shape.pipelined, 2, 1), runs


def _list_matmul_collectives(
    shape: StepShape, group: MatmulGroup, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    work, rules, kernels = shape.work, shape.split.compute, group.kernels
    width = work.config.model.d_model if group.reads != "latent" else group.input_width
    size = shape.tokens * group.rate * work.dtype_bytes * width
    sequence = shape.split.sequence_parallel
    again = backward if shape.remat != "none" and work.ends_wanted(group) else 0
    for kernel in kernels:
        tokens = (*rules.batch, *rules.seq)
        yield from list_weight_collectives(shape, kernel, forward, backward, tokens)
    inputs = {a for k in kernels for x in k.axes[: k.inputs] for a in rules.mesh_axes(x)}
    outputs = {a for k in kernels for x in k.axes[k.inputs :] for a in rules.mesh_axes(x)}

    def send(what: str, kind: str, axes: tuple[str, ...], runs: Number, phase: Phase):
        return PlannedCollective(f"{group.name}: {what}", kind, axes, size, runs, phase, True)

    beside = work.beside_attention(group)
    # The compiler gathers the same array once: what both branches read, or all layers.
    shared = beside and work.config.model.placement == "parallel_shared"
    if group.reads == "latent":
        yield send("its gradient", "all-reduce", tuple(sorted(outputs)), backward, "backward")
    if group.reads == "memory":
        yield send("input", "all-gather", sequence, shape.slots, "forward")
    if group.reads == "residual" and not shared:
        yield send("input", "all-gather", sequence, forward, "forward")
        yield send("input", "all-gather", sequence, backward, "backward")
    if group.reads in ("residual", "memory"):
        yield send("its gradient", "reduce-scatter", sequence, backward, "backward")
        rest = tuple(sorted(outputs.difference(sequence)))
        yield send("its gradient", "all-reduce", rest, backward, "backward")
    if group.writes == "residual":
        yield send("output", "reduce-scatter", sequence, forward, "forward")
        yield send("output", "reduce-scatter", sequence, again, "backward")
        gathers = 0 if beside else backward
        yield send("its gradient", "all-gather", sequence, gathers, "backward")
        rest = tuple(sorted(inputs.difference(sequence)))
        yield send("output", "all-reduce", rest, forward, "forward")
        yield send("output", "all-reduce", rest, again, "backward")


def list_weight_collectives(
    shape: StepShape, kernel: Kernel, forward: Number, backward: Number, token_axes: tuple[str, ...]
) -> Iterator[PlannedCollective]:
    """Kernels gathered from storage, and their gradients reduced into it.

    Under ZeRO-2 kernels are at hand whole, and gradients go to shares of their own; but experts',
    and all of a 1F1B pipeline, are gathered from such shares too.
    """
    split, name = shape.split, kernel.name
    used = kernel.size * shape.work.dtype_bytes / split.shards(split.compute, kernel.axes)
    scattered, here = split.extra(split.gradients, kernel), 1.0
    if split.gradients != split.storage and "expert" not in kernel.axes:
        one_f_one_b = shape.work.config.parallel.schedule == "1f1b"
        here = np.where(shape.pipelined & one_f_one_b, 1.0, 0.0)
    for runs, phase in zip((forward, backward), PASSES, strict=True):
        yield PlannedCollective(name, "all-gather", scattered, used, here * runs, phase, False)
    yield from list_gradient_collectives(shape, kernel, backward, token_axes)


def list_gradient_collectives(
    shape: StepShape, kernel: Kernel, runs: Number, token_axes: tuple[str, ...]
) -> Iterator[PlannedCollective]:
    """A kernel's gradient, reduced into its shares and over the axes that split the tokens."""
    split, what = shape.split, f"{kernel.name}: gradient"
    used = kernel.size * shape.work.dtype_bytes / split.shards(split.compute, kernel.axes)
    scattered = split.extra(split.gradients, kernel)
    yield PlannedCollective(what, "reduce-scatter", scattered, used, runs, "backward", False)
    rest = tuple(axis for axis in token_axes if axis not in scattered)
    left = used / split.ways(scattered)
    yield PlannedCollective(what, "all-reduce", rest, left, runs, "backward", False)


def _list_attention_collectives(
    shape: StepShape, attention: AttentionShape, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    """Lists those of a sequence split over devices, and of kv heads that are whole on several."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    heads, axes = attention.heads, rules.seq
    kv_axes = rules.mesh_axes(heads.kv_axis)
    ways, kv_ways = split.ways(axes), split.ways(kv_axes)
    query_heads = heads.num_heads / split.ways(rules.heads)
    kv_heads = heads.num_kv_heads / kv_ways
    tokens, value = shape.tokens * attention.rate, heads.value_dim
    # Of a key and its value, or a query and its output, each.
    either = tokens * (heads.head_dim + value) / 2
    itemsize = work.dtype_bytes
    again = backward if work.attention_recomputed(shape.remat) else 0
    # Each device takes those kv heads that its query heads read.
    read = np.minimum(kv_heads, np.maximum(kv_heads * kv_ways / split.ways(rules.heads), 1))

    def send(what: str, kind: str, size: Number, runs: Number, phase: Phase, over=axes):
        return PlannedCollective(what, kind, over, size, runs, phase, True)

    both, gradients = "attention: keys and values", "attention: their gradients"
    method = work.config.parallel.context
    if method == "all_gather":
        whole = either * read * ways
        for runs, phase in zip((forward, backward), PASSES, strict=True):
            yield send(both, "all-gather", whole * itemsize, 2 * runs, phase)
        yield send(gradients, "reduce-scatter", whole * FP32, 2 * backward, "backward")
    elif method == "ring":
        block, steps = either * read, _count_ring_steps(shape, attention, ways)
        back = np.where(np.greater(steps, 0), steps + 1, 0)
        for what, size, runs, phase in (
            (both, block * itemsize, 2 * steps * forward, "forward"),
            (both, block * itemsize, 2 * steps * (backward + again), "backward"),
            (gradients, block * FP32, 2 * back * backward, "backward"),
        ):
            yield send(what, "collective-permute", size, runs, phase)
    else:
        copies = ways / np.gcd(np.asarray(np.maximum(read, 1), int), np.asarray(ways, int))
        keys = either * read * copies
        queries, output = (tokens * n * query_heads * itemsize for n in (heads.head_dim, value))
        wire = np.where(np.greater(copies, 1), FP32, itemsize)
        for what, size, runs, phase in (
            ("queries", queries, forward, "forward"),
            ("keys and values", keys * itemsize, 2 * forward, "forward"),
            ("queries", queries, backward, "backward"),
            ("keys and values", keys * itemsize, 2 * backward, "backward"),
            ("output", output, forward + again, "forward"),
            ("gradients", (queries + output) / 2, 2 * backward, "backward"),
            ("gradients of keys and values", keys * wire, 2 * backward, "backward"),
        ):
            yield send(f"attention: {what}", "all-to-all", size, runs, phase)
    if heads.shared_dim:
        what, shared = "attention: shared keys' gradient", tokens * heads.shared_dim * itemsize
        yield send(what, "all-reduce", shared, backward, "backward", rules.heads)
    if rules.heads and not kv_axes:
        # What blocks add up is in fp32; attention of a whole sequence gives its own dtype.
        wire = np.where(np.greater(ways, 1) & (method != "ulysses"), FP32, itemsize)
        whole = either * heads.num_kv_heads * wire * attention.key_len / attention.query_len
        what = "whole kv heads: gradients"
        yield send(what, "all-reduce", whole, 2 * backward, "backward", rules.heads)


def _count_ring_steps(shape: StepShape, attention: AttentionShape, ways: Number) -> Number:
    """Turns of a ring in which keys come from another device (``parallel/context.py``)."""
    if attention.window is None or shape.work.config.parallel.balance_sequence:
        return ways - 1
    rows = attention.query_len / ways
    return np.minimum(ways - 1, np.floor((attention.window + rows - 2) / rows))
