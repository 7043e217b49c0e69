"""Collectives of experts (``parallel/experts.py``): rows there and back, weights, outputs."""

from collections.abc import Iterator

from maxlm.plan.communication.layers import count_passes, list_weight_collectives
from maxlm.plan.network import Phase, PlannedCollective
from maxlm.plan.shape import StepShape, count_received_rows
from maxlm.plan.workload import FP32, Number


def list_expert_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work, split, rules = shape.work, shape.split, shape.split.compute
    experts, router, groups = work.experts, work.router, [m for m in work.matmuls if m.has_experts]
    if experts is None or router is None:
        return
    forward, runs = count_passes(shape, work.expert_layers)
    again = runs if shape.remat != "none" else 0
    wanted = again if any(work.ends_wanted(group) for group in groups) else 0
    width = work.config.model.d_model * work.dtype_bytes
    split_over = tuple(a for a in (*rules.batch, *rules.seq) if a not in rules.expert)
    for kernel in (kernel for group in groups for kernel in group.kernels):
        yield from list_weight_collectives(shape, kernel, forward, runs, split_over)
    axes, size = split.extra(split.storage, router), router.size * FP32
    yield PlannedCollective("router", "all-gather", axes, size, forward, "forward", False)
    yield PlannedCollective("router", "all-gather", axes, size, runs, "backward", False)
    axes, what = (*rules.batch, *rules.residual), "router: gradient"
    yield PlannedCollective(what, "all-reduce", axes, size, runs, "backward", False)
    rows = shape.tokens * experts.experts_per_token
    if experts.capacity_factor is not None or not shape.ragged:
        rows = count_received_rows(shape)
    routed = rows * width
    ragged = shape.ragged and experts.capacity_factor is None
    kind = "ragged-all-to-all" if ragged else "all-to-all"
    exchanges: tuple[tuple[str, Number, Phase], ...] = (
        ("rows there", forward, "forward"),
        ("rows back", forward, "forward"),
        ("rows there", again, "backward"),
        ("rows back", wanted, "backward"),
        ("gradients there", runs, "backward"),
        ("gradients back", runs, "backward"),
    )
    for what, count, phase in exchanges:
        what = f"experts: {what}"
        yield PlannedCollective(what, kind, rules.expert, routed, count, phase, True)
    sequence = split.sequence_parallel
    rest = tuple(axis for axis in rules.mlp if axis not in sequence)
    tokens = shape.tokens * width
    # Shared experts gather the same arrays, and so does attention beside; the compiler gathers them
    # once.
    beside = any(work.beside_attention(group) for group in groups)
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
