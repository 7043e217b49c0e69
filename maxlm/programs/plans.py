"""Plans from files, folders and configs, and candidates verified by a compiler."""

import json
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError, load_config
from maxlm.plan.predict import FORMAT, Machine, RunPlan, plan_run
from maxlm.plan.search import Candidate
from maxlm.plan.show import format_bytes
from maxlm.plan.timing import count_device_flops
from maxlm.programs.compile import CompiledStep, DoesNotFit, compile_step
from maxlm.run import RunConfig
from maxlm.sharding import count_min_devices, mesh_sizes

GB, TERA = 1e9, 1e12
PlannedVersusCompiled = dict[str, tuple[float, float]]
"""Figure → (planned, compiled)."""


def read_or_compute_plan(source: str, machine: Machine | None) -> dict[str, Any]:
    """Reads a plan, as ``RunPlan.to_json`` gives it, of a JSON file, a run's folder (plan.json) or
    a config, which is planned on the machine; None: the smallest mesh there is."""
    path = Path(source)
    path = path / "plan.json" if path.is_dir() else path
    if path.suffix != ".json":
        run = load_config(RunConfig, source).value
        sizes = None if machine else mesh_sizes(run.mesh, count_min_devices(run.mesh))
        return plan_run(run, machine, sizes=sizes).to_json()
    try:
        plan = json.loads(path.read_text())
    except OSError as error:
        raise MaxlmError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError:
        plan = None
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        what = "is no plan that this version reads"
        raise MaxlmError(what, where=str(path), fix="write one with maxlm plan CONFIG --json")
    return plan


def compile_peak_memory_bytes(
    run: RunConfig, machine: Machine, candidates: Sequence[Candidate]
) -> dict[int, float]:
    """Returns, by index, each candidate's peak memory in bytes as the machine's compiler lays it
    out; infinite where it does not fit."""
    peaks = {}
    for i, own in enumerate(candidates):
        try:
            peaks[i] = float(compile_step(own.apply(run), machine.name).memory.peak_bytes)
        except DoesNotFit:
            peaks[i] = inf
    return peaks


def check_fit_by_compiling(
    run: RunConfig, machine: Machine, plan: RunPlan
) -> tuple[bool, str, PlannedVersusCompiled]:
    """Compiles a run for a machine; returns whether it fits, a verdict with the bytes of a device,
    and the plan's figures beside the compiler's."""
    try:
        step = compile_step(run, machine.name)
    except DoesNotFit as error:
        return False, f"does not fit: {error.what}", {}
    peak, limit = step.memory.peak_bytes, machine.chip.memory_bytes
    fits, words = peak <= limit, f"{format_bytes(peak)} of {format_bytes(limit)} a device"
    verdict = f"{'fits' if fits else 'does not fit'} by the compiler's account: {words}"
    return fits, verdict, compare_plan_to_compiled(plan, step)


def compare_plan_to_compiled(plan: RunPlan, step: CompiledStep) -> PlannedVersusCompiled:
    """Returns figure → (planned, compiled), in GB and TFLOP of one device and step.

    Products of a dropless mixture's experts are in kernels that the compiler does not see into;
    rows of a ragged exchange are counted by the compiler at the room they have.
    """
    held, compiled, cost = plan.memory, step.memory, step.cost
    counted, slots = count_device_flops(plan.shape), plan.shape.stage_passes_with_bubble
    resting, more = held.total - held.transient_bytes, compiled.peak_bytes - compiled.argument_bytes
    matmul, attention = counted.step_matmul_flops(slots), counted.step_attention_flops(slots)
    rows = {
        "resting: state and batch, GB": (resting / GB, compiled.argument_bytes / GB),
        "more at the peak, GB": (held.transient_bytes / GB, more / GB),
        "peak, GB": (held.total / GB, compiled.peak_bytes / GB),
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
