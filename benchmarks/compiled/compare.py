"""The plan's figures beside those of the compiled step."""

from benchmarks.compiled.cost import read_step_cost
from maxlm.plan.predict import RunPlan
from maxlm.plan.timing import count_device_flops
from maxlm.plan.workload import StepShape
from maxlm.programs.compile import CompiledStep, compute_peak_bytes

GB, TERA = 1e9, 1e12


def count_step_flops(shape: StepShape) -> tuple[float, float]:
    """Returns a step's planned FLOPs on a device, a pipeline's idle turns included: of all matrix
    products but attention's, and of attention's."""
    flops, slots = count_device_flops(shape), shape.stage_passes_with_bubble
    matmul = slots * (flops.forward + flops.backward) + flops.loss + flops.loss_backward
    return float(matmul), float(slots * (flops.attention_forward + flops.attention_backward))


def compare_plan_to_compiled(plan: RunPlan, step: CompiledStep) -> dict[str, tuple[float, float]]:
    """Returns figure → (planned, compiled), in GB and TFLOP of one device and step.

    Products of a dropless mixture's experts are in kernels that the compiler does not see into;
    rows of a ragged exchange are counted by the compiler at the room they have.
    """
    held, compiled, cost = plan.memory, step.compiled.memory_analysis(), read_step_cost(step)
    matmul, attention = count_step_flops(plan.shape)
    at_rest, peak = compiled.argument_size_in_bytes, compute_peak_bytes(compiled)
    resting, more = held.total - held.transient_bytes, peak - at_rest
    rows = {
        "resting: state and batch, GB": (resting / GB, at_rest / GB),
        "more at the peak, GB": (held.transient_bytes / GB, more / GB),
        "peak, GB": (held.total / GB, peak / GB),
        "matrix products, TFLOP": (matmul / TERA, cost.matmul_flops / TERA),
        "attention's products, TFLOP": (attention / TERA, cost.attention_flops / TERA),
        "sent, GB": (sum(s.sent_bytes for s in plan.collectives) / GB, cost.wire_bytes() / GB),
    }
    planned: dict[tuple[str, str], float] = {}
    for s in plan.collectives:
        key = s.kind, "+".join(s.axes)
        planned[key] = planned.get(key, 0.0) + s.sent_bytes
    found = cost.wire_by_kind_and_axes()
    for kind, axes in sorted(planned.keys() | found.keys()):
        pair = planned.get((kind, axes), 0.0) / GB, found.get((kind, axes), 0) / GB
        if max(pair) > 1e-3:
            rows[f"  {kind} over {axes}, GB"] = pair
    return {what: (float(ours), float(theirs)) for what, (ours, theirs) in rows.items()}
