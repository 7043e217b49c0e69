"""The plan's figures beside the compiler's, for one run on one machine."""

from maxlm.plan.predict import RunPlan
from maxlm.plan.timing import count_device_flops
from maxlm.programs.compile import CompiledStep

GB, TERA = 1e9, 1e12


Figures = dict[str, tuple[float, float]]


def compare(plan: RunPlan, step: CompiledStep) -> Figures:
    """Returns figure → (planned, compiled), in GB and TFLOP of one device and step.

    Products of a dropless mixture's experts are in kernels that the compiler does not see into;
    rows of a ragged exchange are counted by the compiler at the room they have.
    """
    held, compiled, cost = plan.memory, step.memory, step.cost
    counted, slots = count_device_flops(plan.shape), plan.shape.slots
    rows = {
        "resting: state and batch, GB": (
            (held.total - held.allocated) / GB,
            compiled.argument / GB,
        ),
        "more at the peak, GB": (
            held.allocated / GB,
            (compiled.peak - compiled.argument) / GB,
        ),
        "peak, GB": (held.total / GB, compiled.peak / GB),
        "matrix products, TFLOP": (counted.products(slots) / TERA, cost.matmul_flops / TERA),
        "attention's products, TFLOP": (
            counted.attention(slots) / TERA,
            cost.attention_flops / TERA,
        ),
        "sent, GB": (sum(s.sent_bytes for s in plan.sends) / GB, cost.wire_bytes() / GB),
    }
    planned: dict[tuple[str, str], float] = {}
    for s in plan.sends:
        key = s.kind, "+".join(s.axes)
        planned[key] = planned.get(key, 0.0) + s.sent_bytes
    found = cost.wire_by_kind_and_axes()
    for kind, axes in sorted(planned.keys() | found.keys()):
        pair = planned.get((kind, axes), 0.0) / GB, found.get((kind, axes), 0) / GB
        if max(pair) > 1e-3:
            rows[f"  {kind} over {axes}, GB"] = pair
    return {what: (float(ours), float(theirs)) for what, (ours, theirs) in rows.items()}
