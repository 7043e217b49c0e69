"""Every collective of a training step, from layouts alone.

All communication of maxlm is written out in programs on shards (``maxlm/parallel``), so
that it can be told without tracing anything: what a map sends follows from how its
input, its kernels and its output lie (the table in ``parallel/linear.py``), and so for
attention, experts, the embedding, the loss, pipelines and the optimizer. Where an axis
has one device, a collective has no bytes.
"""

from collections.abc import Iterator
from itertools import chain
from math import prod

import numpy as np

from maxlm.parallel.context import count_ring_steps
from maxlm.plan.network import PlannedCollective
from maxlm.plan.stacks import AttentionShape, Kernel, MatmulGroup
from maxlm.plan.workload import FP32, Number, StepShape


def list_collectives(shape: StepShape) -> tuple[PlannedCollective, ...]:
    """Lists every collective of a step that sends more than a few scalars."""
    found = chain(
        _list_layer_collectives(shape),
        _list_expert_collectives(shape),
        _list_end_collectives(shape),
        _list_pipeline_collectives(shape),
        _list_update_collectives(shape),
    )
    return tuple(c for c in found if c.axes and np.any(c.whole_bytes * c.count))


def _in_passes(
    what: str,
    kind: str,
    axes: tuple[str, ...],
    size: Number,
    forward: Number,
    backward: Number,
    *,
    waits: bool = True,
) -> Iterator[PlannedCollective]:
    """One collective of ``size`` bytes, in so many runs of each pass."""
    yield PlannedCollective(what, kind, axes, size, forward, "forward", waits)
    yield PlannedCollective(what, kind, axes, size, backward, "backward", waits)


def _list_layer_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, compute = shape.work, shape.split.compute
    for group, layers in work.matmul_layer_counts.items():
        if not group.has_experts:
            yield from _list_matmul_collectives(
                shape, group, *_count_passes(shape, layers)
            )
    for attention, layers in work.attention_layer_counts.items():
        yield from _list_attention_collectives(
            shape, attention, *_count_passes(shape, layers)
        )
    _, runs = _count_passes(shape, work.num_layers)
    vectors = (s for s in work.select_trained(work.specs) if s.num_layer_axes)
    size = sum(s.size for s in vectors if s.role == "vector" and not s.sign_update)
    size = size / work.num_layers * FP32
    axes = (*compute.batch, *compute.residual)
    yield PlannedCollective(
        "norms: gradients", "all-reduce", axes, size, runs, "backward", False
    )
    for stack in work.stacks:
        tokens = (*compute.batch, *compute.seq)
        passes = _count_passes(shape, stack.num_layers)
        for kernel in stack.adapter_kernels:
            yield from _list_weight_collectives(shape, kernel, *passes, tokens)


def _count_passes(shape: StepShape, layers: Number) -> tuple[Number, Number]:
    """Forward and backward passes of single layers in a step, of so many in all: a
    pipeline's backward pass runs a stage forward once more, to differentiate it."""
    runs = shape.stage_passes_with_bubble * shape.per_stage(layers)
    return runs * np.where(shape.pipelined, 2, 1), runs


def _list_matmul_collectives(
    shape: StepShape, group: MatmulGroup, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    work, rules, kernels = shape.work, shape.split.compute, group.kernels
    is_latent = group.input_features == "latent"
    inputs = kernels[0].num_input_dims
    width = prod(kernels[0].shape[:inputs]) if is_latent else work.config.model.d_model
    size = shape.micro_batch_tokens * group.token_ratio * work.dtype_bytes * width
    sequence = shape.split.sequence_parallel
    again = (
        backward
        if shape.remat != "none" and work.backward_needs_branch_output(group)
        else 0
    )
    for kernel in kernels:
        tokens = (*rules.batch, *rules.seq)
        yield from _list_weight_collectives(shape, kernel, forward, backward, tokens)
    inputs = {
        a
        for k in kernels
        for x in k.axes[: k.num_input_dims]
        for a in rules.mesh_axes(x)
    }
    outputs = {
        a
        for k in kernels
        for x in k.axes[k.num_input_dims :]
        for a in rules.mesh_axes(x)
    }

    def send(what: str, kind: str, axes: tuple[str, ...], ahead: Number, back: Number):
        return _in_passes(f"{group.name}: {what}", kind, axes, size, ahead, back)

    beside = work.is_parallel_to_attention(group)
    # The compiler gathers the same array once: what both branches read, or all layers.
    shared = beside and work.config.model.placement == "parallel_shared"
    if is_latent:
        yield from send(
            "its gradient", "all-reduce", tuple(sorted(outputs)), 0, backward
        )
    if group.input_features == "memory":
        yield from send(
            "input", "all-gather", sequence, shape.stage_passes_with_bubble, 0
        )
    if group.input_features == "residual" and not shared:
        yield from send("input", "all-gather", sequence, forward, backward)
    if group.input_features in ("residual", "memory"):
        rest = tuple(sorted(outputs.difference(sequence)))
        yield from send("its gradient", "reduce-scatter", sequence, 0, backward)
        yield from send("its gradient", "all-reduce", rest, 0, backward)
    if group.output_features == "residual":
        rest = tuple(sorted(inputs.difference(sequence)))
        yield from send("output", "reduce-scatter", sequence, forward, again)
        yield from send(
            "its gradient", "all-gather", sequence, 0, 0 if beside else backward
        )
        yield from send("output", "all-reduce", rest, forward, again)


def _list_weight_collectives(
    shape: StepShape,
    kernel: Kernel,
    forward: Number,
    backward: Number,
    token_axes: tuple[str, ...],
) -> Iterator[PlannedCollective]:
    """Kernels gathered from storage, and their gradients reduced into it.

    Under ZeRO-2 kernels are at hand whole, and gradients go to shares of their own; but
    experts', and all of a 1F1B pipeline, are gathered from such shares too.
    """
    split = shape.split
    used = shape.gathered_weight_bytes(kernel)
    scattered = split.gather_axes(split.gradients, kernel)
    here = 1.0
    if split.gradients != split.storage and "expert" not in kernel.axes:
        here = np.where(shape.pipelined & shape.one_f_one_b, 1.0, 0.0)
    runs = here * forward, here * backward
    yield from _in_passes(
        kernel.name, "all-gather", scattered, used, *runs, waits=False
    )
    if kernel.is_trained:
        yield from _list_gradient_collectives(shape, kernel, backward, token_axes)


def _list_gradient_collectives(
    shape: StepShape, kernel: Kernel, runs: Number, token_axes: tuple[str, ...]
) -> Iterator[PlannedCollective]:
    """A kernel's gradient, reduced into its shares and over the axes that split the
    tokens."""
    split = shape.split
    what = f"{kernel.name}: gradient"
    used = shape.gathered_weight_bytes(kernel)
    scattered = split.gather_axes(split.gradients, kernel)
    yield PlannedCollective(
        what, "reduce-scatter", scattered, used, runs, "backward", False
    )
    rest = tuple(axis for axis in token_axes if axis not in scattered)
    left = used / split.num_devices(scattered)
    yield PlannedCollective(what, "all-reduce", rest, left, runs, "backward", False)


def _list_attention_collectives(
    shape: StepShape, attention: AttentionShape, forward: Number, backward: Number
) -> Iterator[PlannedCollective]:
    """Lists those of a sequence split over devices, and of kv heads that are whole on
    several."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    heads, axes = attention.heads, rules.seq
    kv_axes = rules.mesh_axes(heads.kv_axis)
    ways, kv_ways = split.num_devices(axes), split.num_devices(kv_axes)
    query_heads = heads.num_heads / split.num_devices(rules.heads)
    kv_heads = heads.num_kv_heads / kv_ways
    tokens = shape.micro_batch_tokens * attention.token_ratio
    value = heads.value_dim
    # Of a key and its value, or a query and its output, each.
    either = tokens * (heads.head_dim + value) / 2
    itemsize = work.dtype_bytes
    again = backward if work.is_attention_recomputed(shape.remat) else 0
    # Each device takes those kv heads that its query heads read.
    read = np.minimum(
        kv_heads, np.maximum(kv_heads * kv_ways / split.num_devices(rules.heads), 1)
    )

    def send(what: str, kind: str, size: Number, ahead: Number, back: Number):
        return _in_passes(f"attention: {what}", kind, axes, size, ahead, back)

    both, gradients = "keys and values", "their gradients"
    method = work.config.parallel.context
    if method == "all_gather":
        whole = either * read * ways
        yield from send(both, "all-gather", whole * itemsize, 2 * forward, 2 * backward)
        yield from send(gradients, "reduce-scatter", whole * FP32, 0, 2 * backward)
    elif method == "ring":
        kind = "collective-permute"
        block = either * read
        window = None if work.config.parallel.balance_sequence else attention.window
        steps = 2 * count_ring_steps(ways, attention.query_len / ways, window)
        back = np.where(np.greater(steps, 0), steps + 2, 0)
        yield from send(
            both, kind, block * itemsize, steps * forward, steps * (backward + again)
        )
        yield from send(gradients, kind, block * FP32, 0, back * backward)
    else:
        copies = ways / np.gcd(
            np.asarray(np.maximum(read, 1), int), np.asarray(ways, int)
        )
        keys = either * read * copies
        queries, output = (
            tokens * n * query_heads * itemsize for n in (heads.head_dim, value)
        )
        wire = np.where(np.greater(copies, 1), FP32, itemsize)
        for what, size, ahead, back in (
            ("queries", queries, forward, backward),
            (both, keys * itemsize, 2 * forward, 2 * backward),
            ("output", output, forward + again, 0),
            ("gradients", (queries + output) / 2, 0, 2 * backward),
            ("gradients of keys and values", keys * wire, 0, 2 * backward),
        ):
            yield from send(what, "all-to-all", size, ahead, back)
    if heads.shared_key_dim:
        what = "attention: shared keys' gradient"
        shared = tokens * heads.shared_key_dim * itemsize
        yield PlannedCollective(
            what, "all-reduce", rules.heads, shared, backward, "backward"
        )
    if rules.heads and not kv_axes:
        # What blocks add up is in fp32; attention of a whole sequence gives its own
        # dtype.
        wire = np.where(np.greater(ways, 1) & (method != "ulysses"), FP32, itemsize)
        whole = (
            either * heads.num_kv_heads * wire * attention.key_len / attention.query_len
        )
        what = "whole kv heads: gradients"
        yield PlannedCollective(
            what, "all-reduce", rules.heads, whole, 2 * backward, "backward"
        )


def _list_expert_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules = shape.work, shape.split, shape.split.compute
    experts, router = work.experts, work.router
    groups = [m for m in work.matmul_layer_counts if m.has_experts]
    if experts is None or router is None:
        return
    forward, runs = _count_passes(shape, work.num_expert_layers)
    again = runs if shape.remat != "none" else 0
    wanted = (
        again
        if any(work.backward_needs_branch_output(group) for group in groups)
        else 0
    )
    width = work.config.model.d_model * work.dtype_bytes
    split_over = tuple(a for a in (*rules.batch, *rules.seq) if a not in rules.expert)
    for kernel in (kernel for group in groups for kernel in group.kernels):
        yield from _list_weight_collectives(shape, kernel, forward, runs, split_over)
    axes = split.gather_axes(split.storage, router)
    size = router.size * FP32
    yield from _in_passes(
        "router", "all-gather", axes, size, forward, runs, waits=False
    )
    axes = (*rules.batch, *rules.residual)
    what = "router: gradient"
    yield PlannedCollective(what, "all-reduce", axes, size, runs, "backward", False)
    kind = "all-to-all"
    rows = shape.expert_buffer_rows
    if shape.ragged and experts.capacity_factor is None:
        kind = "ragged-all-to-all"
        rows = shape.micro_batch_tokens * experts.experts_per_token
    routed = rows * width
    for what, ahead, back in (
        ("rows there", forward, again),
        ("rows back", forward, wanted),
        ("gradients there", 0, runs),
        ("gradients back", 0, runs),
    ):
        yield from _in_passes(
            f"experts: {what}", kind, rules.expert, routed, ahead, back
        )
    sequence = split.sequence_parallel
    rest = tuple(axis for axis in rules.mlp if axis not in sequence)
    tokens = shape.micro_batch_tokens * width
    # Shared experts gather the same arrays, and so does attention beside; the compiler
    # gathers them once.
    beside = any(work.is_parallel_to_attention(group) for group in groups)
    same_input = beside and work.config.model.placement == "parallel_shared"
    inputs = () if experts.has_shared or same_input else sequence
    gradients = () if experts.has_shared or beside else sequence
    for what, kind, axes, ahead, back in (
        ("output", "reduce-scatter", sequence, forward, runs + wanted),
        ("output", "all-reduce", rest, forward, runs + wanted),
        ("input", "all-gather", inputs, forward, runs),
        ("output's gradient", "all-gather", gradients, 0, runs),
    ):
        yield from _in_passes(f"experts: {what}", kind, axes, tokens, ahead, back)


def _list_end_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists those of the embedding, learned positions, matrices outside the layers and
    the loss."""
    yield from _list_loss_collectives(shape)
    work, rules, runs = shape.work, shape.split.compute, shape.loss_calls
    for kernel in work.non_layer_kernels:
        tokens = (*rules.batch, *rules.residual, *_stages(shape))
        yield from _list_weight_collectives(shape, kernel, runs, runs, tokens)
    for name, spec in work.base_specs.items():
        if name in work.embedding_lookup_rates:
            how = {"is_trained": name in work.trained_base_names}
            table = Kernel(name.removesuffix(".table"), spec.shape, spec.axes, 1, **how)
            first = name == next(iter(work.embedding_lookup_rates))
            for rate in work.embedding_lookup_rates[name]:
                yield from _list_lookup_collectives(shape, table, rate, first)


def _list_loss_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules, runs = (
        shape.work,
        shape.split,
        shape.split.compute,
        shape.loss_calls,
    )
    hidden = shape.embedding_loss_tokens * work.config.model.d_model * work.dtype_bytes
    yield from _list_weight_collectives(shape, work.head, runs, 0 * runs, ())
    tokens = (*rules.batch, *rules.residual, *_stages(shape))
    rest = tuple(axis for axis in tokens if axis not in rules.vocab)
    if work.head.is_trained:
        yield from _list_gradient_collectives(shape, work.head, runs, rest)
    sequence = split.sequence_parallel
    shared = tuple(axis for axis in sequence if axis in rules.vocab)
    others = tuple(axis for axis in rules.vocab if axis not in sequence)
    for what, kind, axes in (
        ("loss: hidden states", "all-gather", shared),
        ("loss: their gradient", "reduce-scatter", shared),
        ("loss: their gradient", "all-reduce", others),
    ):
        yield PlannedCollective(what, kind, axes, hidden, runs, "backward")


def _list_lookup_collectives(
    shape: StepShape, table: Kernel, rate: float, first: bool
) -> Iterator[PlannedCollective]:
    """Columns of a table in storage are exchanged for tokens; rows split over the
    vocabulary are partial sums, and what splits the residual stream further is
    scattered (``parallel/embedding.py``). ``rate`` tokens are looked up for each of the
    batch; the ``first`` table is that of tokens."""
    work, split, rules, runs = (
        shape.work,
        shape.split,
        shape.split.compute,
        shape.embedding_calls,
    )
    vocab = rules.mesh_axes(table.axes[0])
    sequence = split.sequence_parallel
    tokens = (*rules.batch, *rules.seq)
    exchanged = tuple(
        a for a in split.gather_axes(split.gradients, table) if a in tokens
    )
    rows = (
        shape.embedding_loss_tokens
        * rate
        * work.config.model.d_model
        * work.dtype_bytes
    )
    what, gradient = f"{table.name}: rows", f"{table.name}: gradient"
    some = rows / split.num_devices(sequence)
    yield PlannedCollective(what, "all-to-all", exchanged, some, runs, "forward")
    yield PlannedCollective(what, "reduce-scatter", sequence, rows, runs, "forward")
    summed = tuple(axis for axis in vocab if axis not in sequence)
    yield PlannedCollective(what, "all-reduce", summed, rows, runs, "forward")
    held = table.size * work.dtype_bytes / split.num_shards(split.gradients, table.axes)
    rest = tuple(a for a in (*tokens, *_stages(shape)) if a not in (*exchanged, *vocab))
    if table.is_trained:
        yield PlannedCollective(
            gradient, "all-reduce", rest, held, runs, "backward", False
        )
    # Once for all tables: rows of each are added up, and have the same gradient.
    if first and table.is_trained:
        yield PlannedCollective(
            gradient, "all-to-all", exchanged, some, runs, "backward"
        )
        yield PlannedCollective(
            gradient, "all-gather", sequence, rows, runs, "backward"
        )


def _stages(shape: StepShape) -> tuple[str, ...]:
    """Mesh axes of a pipeline over which tokens lie spread before its layers and
    after."""
    return () if shape.one_f_one_b else shape.split.compute.layers


def _list_pipeline_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Activations to the next stage and gradients to the one before, a turn; a circular
    pipeline carries inputs and results as well."""
    work, split, axes = shape.work, shape.split, shape.split.compute.layers
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    runs = (1 if shape.one_f_one_b else 3) * shape.pipeline_iterations
    kind = "collective-permute"
    yield PlannedCollective(
        "pipeline: to the next stage", kind, axes, one, runs, "forward"
    )
    yield PlannedCollective(
        "pipeline: to the one before", kind, axes, one, runs, "backward"
    )
    if shape.one_f_one_b:
        ends = split.local_bytes(split.gradients, work.non_layer_specs.values())
        yield PlannedCollective(
            "ends: gradients", "all-reduce", axes, ends, 1.0, "once"
        )


def _list_update_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Yields gathers of updates where moments lie in smaller shares than parameters
    (ZeRO-1, 2)."""
    work, split = shape.work, shape.split
    if split.optimizer == split.storage:
        return
    for name, spec in work.specs.items():
        if name not in work.trained_names:
            continue
        at_rest = {a for axis in spec.axes for a in split.storage.mesh_axes(axis)}
        finer = (a for axis in spec.axes for a in split.optimizer.mesh_axes(axis))
        axes = tuple(dict.fromkeys(axis for axis in finer if axis not in at_rest))
        whole = split.local_bytes(split.storage, [spec])
        what = f"{name.partition('.kernel')[0]}: update"
        yield PlannedCollective(what, "all-gather", axes, whole, 1.0, "once")
