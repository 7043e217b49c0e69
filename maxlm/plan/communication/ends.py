"""Collectives of the embedding, the loss, a pipeline's turns and the update."""

from collections.abc import Iterator

from maxlm.plan.communication.layers import list_gradient_collectives, list_weight_collectives
from maxlm.plan.network import PASSES, PlannedCollective
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import Kernel


def list_end_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists those of the embedding, learned positions, matrices outside the layers and the loss."""
    yield from _list_loss_collectives(shape)
    work, rules, runs = shape.work, shape.split.compute, shape.losses
    for kernel in work.outer_kernels:
        tokens = (*rules.batch, *rules.residual, *_stages(shape))
        yield from list_weight_collectives(shape, kernel, runs, runs, tokens)
    for name, spec in work.base_specs.items():
        if name in work.tables:
            table = Kernel(name.removesuffix(".table"), spec.shape, spec.axes, 1)
            first = name == next(iter(work.tables))
            for rate in work.tables[name]:
                yield from _list_lookup_collectives(shape, table, rate, first)


def _list_loss_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules, runs = shape.work, shape.split, shape.split.compute, shape.losses
    head, hidden = work.head, shape.end_tokens * work.config.model.d_model * work.dtype_bytes
    yield from list_weight_collectives(shape, head, runs, 0 * runs, ())
    tokens = (*rules.batch, *rules.residual, *_stages(shape))
    rest = tuple(axis for axis in tokens if axis not in rules.vocab)
    yield from list_gradient_collectives(shape, head, runs, rest)
    sequence = split.sequence_parallel
    shared = tuple(axis for axis in sequence if axis in rules.vocab)
    others = tuple(axis for axis in rules.vocab if axis not in sequence)
    for what, kind, axes in (
        ("loss: hidden states", "all-gather", shared),
        ("loss: their gradient", "reduce-scatter", shared),
        ("loss: their gradient", "all-reduce", others),
    ):
        yield PlannedCollective(what, kind, axes, hidden, runs, "backward", True)


def _list_lookup_collectives(
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
    vocab, sequence = rules.mesh_axes(table.axes[0]), split.sequence_parallel
    tokens = (*rules.batch, *rules.seq)
    exchanged = tuple(a for a in split.extra(split.gradients, table) if a in tokens)
    rows = shape.end_tokens * rate * work.config.model.d_model * work.dtype_bytes
    what, gradient = f"{table.name}: rows", f"{table.name}: gradient"
    some = rows / split.ways(sequence)
    yield PlannedCollective(what, "all-to-all", exchanged, some, runs, "forward", True)
    yield PlannedCollective(what, "reduce-scatter", sequence, rows, runs, "forward", True)
    summed = tuple(axis for axis in vocab if axis not in sequence)
    yield PlannedCollective(what, "all-reduce", summed, rows, runs, "forward", True)
    held = table.size * work.dtype_bytes / split.shards(split.gradients, table.axes)
    rest = tuple(a for a in (*tokens, *_stages(shape)) if a not in (*exchanged, *vocab))
    yield PlannedCollective(gradient, "all-reduce", rest, held, runs, "backward", False)
    if first:  # once for all tables: rows of each are added up, and have the same gradient
        yield PlannedCollective(gradient, "all-to-all", exchanged, some, runs, "backward", True)
        yield PlannedCollective(gradient, "all-gather", sequence, rows, runs, "backward", True)


def _stages(shape: StepShape) -> tuple[str, ...]:
    """Mesh axes of a pipeline over which tokens lie spread before its layers and after."""
    one_f_one_b = shape.work.config.parallel.schedule == "1f1b"
    return () if one_f_one_b else shape.split.compute.layers


def list_pipeline_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Activations to the next stage and gradients to the one before, a turn; a circular pipeline
    carries inputs and results as well."""
    work, split, axes = shape.work, shape.split, shape.split.compute.layers
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    one_f_one_b = work.config.parallel.schedule == "1f1b"
    runs = (1 if one_f_one_b else 3) * shape.ticks
    for what, phase in zip(("to the next stage", "to the one before"), PASSES, strict=True):
        what = f"pipeline: {what}"
        yield PlannedCollective(what, "collective-permute", axes, one, runs, phase, True)
    if one_f_one_b:
        ends = split.held_bytes(split.gradients, work.outer_specs.values())
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
        whole = split.held_bytes(split.storage, [spec])
        what = f"{name.partition('.kernel')[0]}: update"
        yield PlannedCollective(what, "all-gather", axes, whole, 1.0, "once", True)
