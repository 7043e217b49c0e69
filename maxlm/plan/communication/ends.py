"""Collectives of the embedding, the loss, a pipeline's turns and the update."""

from collections.abc import Iterator

from maxlm.plan.communication.collective import PASSES, PlannedCollective
from maxlm.plan.communication.layers import list_weight_collectives
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import Kernel


def list_end_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists those of the embedding, learned positions, matrices outside the layers and the loss."""
    yield from _loss(shape)
    work, rules, runs = shape.work, shape.split.compute, shape.losses
    for kernel in work.outer_kernels:
        tokens = (*rules.batch, *rules.residual, *_stages(shape))
        yield from list_weight_collectives(shape, kernel, runs, runs, tokens)
    for name, spec in work.base_specs.items():
        if name in work.tables:
            table = Kernel(name.removesuffix(".table"), spec.shape, spec.axes, 1)
            first = name == next(iter(work.tables))
            for rate in work.tables[name]:
                yield from _lookup(shape, table, rate, first)


def _loss(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules, runs = shape.work, shape.split, shape.split.compute, shape.losses
    head, hidden = work.head, shape.end_tokens * work.config.model.d_model * work.dtype_bytes
    yield from list_weight_collectives(shape, head, runs, 0 * runs, ())
    used = head.size * work.dtype_bytes / split.shards(rules, head.axes)
    scattered = split.extra(split.gradients, head)
    rest = tuple(
        axis
        for axis in (*rules.batch, *rules.residual, *_stages(shape))
        if axis not in (*scattered, *rules.vocab)
    )
    what = "head: gradient"
    yield PlannedCollective(what, "reduce-scatter", scattered, used, runs, "backward", False)
    left = used / split.ways(scattered)
    yield PlannedCollective(what, "all-reduce", rest, left, runs, "backward", False)
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    vocab = tuple(axis for axis in rules.vocab if axis not in sequence)
    shared = tuple(axis for axis in sequence if axis in rules.vocab)
    for what, kind, axes in (
        ("loss: hidden states", "all-gather", shared),
        ("loss: their gradient", "reduce-scatter", shared),
        ("loss: their gradient", "all-reduce", vocab),
    ):
        yield PlannedCollective(what, kind, axes, hidden, runs, "backward", True)


def _lookup(
    shape: StepShape, table: Kernel, rate: float, first: bool
) -> Iterator[PlannedCollective]:
    """Columns of a table in storage are exchanged for tokens; rows split over the vocabulary are
    partial sums, and what splits the residual stream further is scattered
    (``parallel/embedding.py``).

    Args:
        rate: tokens that are looked up for each of the batch.
        first: whether this is the table of tokens.
    """
    work, split, rules, runs = shape.work, shape.split, shape.split.compute, shape.lookups
    vocab = rules.mesh_axes(table.axes[0])
    extra = split.extra(split.gradients, table)
    exchanged = tuple(axis for axis in extra if axis in (*rules.batch, *rules.seq))
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    summed = tuple(axis for axis in vocab if axis not in sequence)
    rows = shape.end_tokens * rate * work.config.model.d_model * work.dtype_bytes
    for kind, axes, whole in (
        ("all-to-all", exchanged, rows / split.ways(sequence)),
        ("reduce-scatter", sequence, rows),
        ("all-reduce", summed, rows),
    ):
        yield PlannedCollective(f"{table.name}: rows", kind, axes, whole, runs, "forward", True)
    held = table.size * work.dtype_bytes / split.shards(split.gradients, table.axes)
    tokens = (*rules.batch, *rules.seq, *_stages(shape))
    rest = tuple(axis for axis in tokens if axis not in (*exchanged, *vocab))
    yield PlannedCollective(
        f"{table.name}: gradient", "all-reduce", rest, held, runs, "backward", False
    )
    if first:
        # Once for all tables: rows of each are added up, and have the same gradient.
        for kind, axes, whole in (
            ("all-to-all", exchanged, rows / split.ways(sequence)),
            ("all-gather", sequence, rows),
        ):
            yield PlannedCollective(
                f"{table.name}: gradient", kind, axes, whole, runs, "backward", True
            )


def _stages(shape: StepShape) -> tuple[str, ...]:
    """Mesh axes of a pipeline over which tokens lie spread before its layers and after."""
    one_f_one_b = shape.work.config.parallel.schedule == "1f1b"
    return () if one_f_one_b else shape.split.compute.layers


def list_pipeline_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Activations to the next stage and gradients to the one before, a turn; a circular pipeline
    carries inputs and results as well."""
    work, axes = shape.work, shape.split.compute.layers
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    streams = 1 if work.config.parallel.schedule == "1f1b" else 3
    for what, phase in zip(("to the next stage", "to the one before"), PASSES, strict=True):
        yield PlannedCollective(
            *(f"pipeline: {what}", "collective-permute", axes, one),
            *(streams * shape.ticks, phase, True),
        )
    if work.config.parallel.schedule == "1f1b":
        ends = sum(
            spec.nbytes / shape.split.shards(shape.split.gradients, spec.axes)
            for spec in work.outer_specs.values()
        )
        yield PlannedCollective("ends: gradients", "all-reduce", axes, ends, 1.0, "once", True)


def list_update_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Where moments lie in smaller shares than parameters (ZeRO-1 and 2), updates are gathered."""
    work, split = shape.work, shape.split
    if split.optimizer == split.storage:
        return
    for name, spec in work.specs.items():
        if name not in work.trained:
            continue
        at_rest = {a for axis in spec.axes for a in split.storage.mesh_axes(axis)}
        finer = (a for axis in spec.axes for a in split.optimizer.mesh_axes(axis))
        axes = tuple(dict.fromkeys(axis for axis in finer if axis not in at_rest))
        whole = spec.nbytes / split.shards(split.storage, spec.axes)
        what = f"{name.partition('.kernel')[0]}: update"
        yield PlannedCollective(what, "all-gather", axes, whole, 1.0, "once", True)
