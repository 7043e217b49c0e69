"""Collectives of experts (``parallel/experts.py``): rows there and back, weights, outputs."""

from collections.abc import Iterator

from maxlm.plan.communication.collective import FP32, Phase, PlannedCollective
from maxlm.plan.communication.layers import count_passes, list_weight_collectives
from maxlm.plan.shape import StepShape, count_received_rows
from maxlm.plan.workload import Number


def list_expert_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules = shape.work, shape.split, shape.split.compute
    experts, router, maps = work.experts, work.router, [m for m in work.maps if m.experts]
    if experts is None or router is None:
        return
    forward, runs = count_passes(shape, work.expert_layers)
    again = runs if shape.remat != "none" else 0
    wanted = again if any(work.ends_wanted(m) for m in maps) else 0
    itemsize, width = work.dtype_bytes, work.config.model.d_model * work.dtype_bytes
    split_over = tuple(a for a in (*rules.batch, *rules.seq) if a not in rules.expert)
    for kernel in (kernel for map_ in maps for kernel in map_.kernels):
        yield from list_weight_collectives(shape, kernel, forward, runs, split_over)
    axes = split.extra(split.storage, router)
    size = router.size * FP32
    yield PlannedCollective("router", "all-gather", axes, size, forward, "forward", False)
    yield PlannedCollective("router", "all-gather", axes, size, runs, "backward", False)
    yield PlannedCollective(
        "router: gradient",
        "all-reduce",
        (*rules.batch, *rules.residual),
        size,
        runs,
        "backward",
        False,
    )
    rows = shape.tokens * experts.experts_per_token
    if experts.capacity_factor is not None or not shape.ragged:
        rows = count_received_rows(shape)
    routed = rows * width

    def moved(what: str, runs: Number, phase: Phase):
        ragged = shape.ragged and experts.capacity_factor is None
        kind = "ragged-all-to-all" if ragged else "all-to-all"
        return PlannedCollective(f"experts: {what}", kind, rules.expert, routed, runs, phase, True)

    yield moved("rows there", forward, "forward")
    yield moved("rows back", forward, "forward")
    yield moved("rows there", again, "backward")
    yield moved("rows back", wanted, "backward")
    yield moved("gradients there", runs, "backward")
    yield moved("gradients back", runs, "backward")
    sequence = tuple(axis for axis in rules.residual if axis not in rules.seq)
    rest = tuple(axis for axis in rules.mlp if axis not in sequence)
    tokens = shape.tokens * work.config.model.d_model * itemsize
    # Shared experts gather the same arrays, and so does attention beside; the compiler gathers them
    # once.
    beside = any(work.beside_attention(map_) for map_ in maps)
    same_input = beside and work.config.model.placement == "parallel_shared"
    inputs = () if experts.has_shared or same_input else sequence
    gradients = () if experts.has_shared or beside else sequence
    for what, kind, axes, ahead, back in (
        ("output", "reduce-scatter", sequence, forward, runs + wanted),
        ("output", "all-reduce", rest, forward, runs + wanted),
        ("input", "all-gather", inputs, forward, runs),
        ("output's gradient", "all-gather", gradients, 0, runs),
    ):
        yield PlannedCollective(f"experts: {what}", kind, axes, tokens, ahead, "forward", True)
        yield PlannedCollective(f"experts: {what}", kind, axes, tokens, back, "backward", True)
