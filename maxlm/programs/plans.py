"""Plans from files, folders and configs, and candidates verified by a compiler."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError, load_config
from maxlm.plan.predict import FORMAT, Machine, RunPlan, plan_run
from maxlm.plan.search import Candidate
from maxlm.plan.show import format_bytes
from maxlm.programs.compile import DoesNotFit, compile_step
from maxlm.run import RunConfig
from maxlm.sharding import count_min_devices, mesh_sizes


@dataclass(frozen=True)
class CompilerVerdict:
    """Whether a run fits by its compiler's account."""

    fits: bool
    words: str
    """Verdict with the bytes of a device."""
    seconds: float | None = None
    """Seconds to compile; None: the compiler finds no room."""
    figures: Mapping[str, tuple[float | None, int]] = field(default_factory=dict)
    """Part of a device's memory → (planned, compiled), bytes; None: not planned on its own."""


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


def check_fit_by_compiling(run: RunConfig, machine: Machine, plan: RunPlan) -> CompilerVerdict:
    """Compiles a run for a machine; compares the memory of a device with the plan's."""
    try:
        step = compile_step(run, machine.name)
    except DoesNotFit as error:
        return CompilerVerdict(False, f"does not fit: {error.what}")
    memory, limit, held = step.memory, machine.chip.memory_bytes, plan.memory
    peak, transient = float(held.total), float(held.transient_bytes)
    figures = {
        "arguments: state and batch": (peak - transient, memory.argument_bytes),
        "outputs": (None, memory.output_bytes),
        "outputs in arguments' place": (None, memory.alias_bytes),
        "temporaries": (transient, memory.temp_bytes),
        "peak": (peak, memory.peak_bytes),
    }
    fits = memory.peak_bytes <= limit
    words = f"{'fits' if fits else 'does not fit'} by the compiler's account: "
    words += f"{format_bytes(memory.peak_bytes)} of {format_bytes(limit)} a device"
    return CompilerVerdict(fits, words, step.seconds, figures)
