"""Of the embedding, the loss, a pipeline's turns and the update."""

from collections.abc import Iterator

import numpy as np

from maxlm.plan.communication.collective import PASSES, Collective
from maxlm.plan.communication.layers import weights
from maxlm.plan.shape import Shape
from maxlm.plan.workload import Kernel, Number


def ends(shape: Shape) -> Iterator[Collective]:
    """Of the embedding and the loss.

    Under 1F1B every stage computes both each turn, and the embedding twice, to differentiate it.
    """
    work, split, rules = shape.work, shape.split, shape.split.compute
    one_f_one_b = work.config.parallel.schedule == "1f1b"
    spread = 1.0 if one_f_one_b else shape.stages
    runs = np.where(shape.pipelined & one_f_one_b, shape.slots, shape.micro / spread)
    width, tokens = work.config.model.d_model * work.dtype_bytes, shape.tokens
    head = work.head
    data = (*rules.batch, *rules.residual)
    yield from weights(shape, head, runs, 0 * runs, data)
    used = head.size * work.dtype_bytes / split.shards(rules, head.axes)
    scattered = split.extra(split.gradients, head)
    rest = tuple(axis for axis in data if axis not in (*scattered, *rules.vocab))
    what = "head: gradient"
    yield Collective(what, "reduce-scatter", scattered, used, runs, "backward", False)
    yield Collective(
        what, "all-reduce", rest, used / split.ways(scattered), runs, "backward", False
    )
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    vocab = tuple(axis for axis in rules.vocab if axis not in sequence)
    shared = tuple(axis for axis in sequence if axis in rules.vocab)
    for what, kind, axes in (
        ("loss: hidden states", "all-gather", shared),
        ("loss: their gradient", "reduce-scatter", shared),
        ("loss: their gradient", "all-reduce", vocab),
    ):
        yield Collective(what, kind, axes, tokens * width, runs, "backward", True)
    yield from _embedding(shape, runs)


def _embedding(shape: Shape, runs: Number) -> Iterator[Collective]:
    """Columns of a table in storage are exchanged for tokens; rows split over the vocabulary are
    partial sums (``parallel/embedding.py``)."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    spec = work.specs["embedding.table"]
    table = Kernel("embedding", spec.shape, spec.axes, 1)
    width = work.config.model.d_model * work.dtype_bytes
    extra = split.extra(split.gradients, table)
    again = runs * np.where(shape.pipelined & (work.config.parallel.schedule == "1f1b"), 2, 1)
    exchanged = tuple(axis for axis in extra if axis in (*rules.batch, *rules.seq))
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    scattered = tuple(axis for axis in rules.vocab if axis in sequence)
    summed = tuple(axis for axis in rules.vocab if axis not in sequence)
    rows = shape.tokens * width
    for what, kind, axes, whole in (
        ("rows", "all-to-all", exchanged, rows / split.ways(scattered)),
        ("rows", "reduce-scatter", scattered, rows),
        ("rows", "all-reduce", summed, rows),
    ):
        yield Collective(f"embedding: {what}", kind, axes, whole, again, "forward", True)
    yield Collective(
        *("embedding: gradient", "all-to-all", exchanged, rows / split.ways(scattered)),
        *(runs, "backward", True),
    )
    yield Collective(
        *("embedding: gradient", "all-gather", scattered, rows, runs, "backward", True)
    )
    held = spec.size * work.dtype_bytes / split.shards(split.gradients, spec.axes)
    rest = tuple(a for a in (*rules.batch, *rules.seq) if a not in (*exchanged, *rules.vocab))
    yield Collective("embedding: gradient", "all-reduce", rest, held, runs, "backward", False)


def pipeline(shape: Shape) -> Iterator[Collective]:
    """Activations to the next stage and gradients to the one before, a turn; a circular pipeline
    carries inputs and results as well."""
    work, axes = shape.work, shape.split.compute.layers
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    streams = 1 if work.config.parallel.schedule == "1f1b" else 3
    for what, phase in zip(("to the next stage", "to the one before"), PASSES, strict=True):
        yield Collective(
            *(f"pipeline: {what}", "collective-permute", axes, one),
            *(streams * shape.ticks, phase, True),
        )
    if work.config.parallel.schedule == "1f1b":
        ends = sum(
            spec.nbytes / shape.split.shards(shape.split.gradients, spec.axes)
            for spec in work.outer_specs.values()
        )
        yield Collective("ends: gradients", "all-reduce", axes, ends, 1.0, "once", True)


def update(shape: Shape) -> Iterator[Collective]:
    """Where moments lie in smaller shares than parameters (ZeRO-1 and 2), updates are gathered."""
    work, split = shape.work, shape.split
    if split.optimizer == split.storage:
        return
    for name, spec in work.specs.items():
        at_rest = {a for axis in spec.axes for a in split.storage.mesh_axes(axis)}
        finer = (a for axis in spec.axes for a in split.optimizer.mesh_axes(axis))
        axes = tuple(dict.fromkeys(axis for axis in finer if axis not in at_rest))
        whole = spec.nbytes / split.shards(split.storage, spec.axes)
        what = f"{name.removesuffix('.kernel')}: update"
        yield Collective(what, "all-gather", axes, whole, 1.0, "once", True)
