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
from maxlm.programs.compare import Figures, compare
from maxlm.programs.compile import DoesNotFit, compile_step
from maxlm.run import RunConfig
from maxlm.sharding import count_min_devices, mesh_sizes


def read_plan(source: str, on: str | None) -> dict[str, Any]:
    """A plan as ``Plan.to_json`` gives it.

    Args:
        source: a JSON file, a run's folder (its plan.json), or a config.
        on: the machine that a config is planned on; None: the smallest mesh there is.

    Raises:
        MaxlmError: it cannot be read, or is no plan.
    """
    path = Path(source)
    path = path / "plan.json" if path.is_dir() else path
    if path.suffix != ".json":
        run = load_config(RunConfig, source).value
        if on is None:
            return plan_run(run, sizes=mesh_sizes(run.mesh, count_min_devices(run.mesh))).to_json()
        return plan_run(run, Machine.from_name(on)).to_json()
    try:
        plan = json.loads(path.read_text())
    except OSError as error:
        raise MaxlmError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError:
        plan = None
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise MaxlmError(
            "is no plan that this version reads",
            where=str(path),
            fix="write one with maxlm plan CONFIG --json",
        )
    return plan


def verify_by_compiling(
    run: RunConfig, machine: Machine, candidates: Sequence[Candidate]
) -> dict[int, float]:
    """Returns, by index, each candidate's peak memory in bytes as the machine's compiler lays it
    out; infinite where it does not fit.

    Raises:
        MaxlmError: the compiler is not installed.
    """
    peaks = {}
    for i, own in enumerate(candidates):
        try:
            peaks[i] = float(compile_step(own.apply(run), machine.name).memory.peak)
        except DoesNotFit:
            peaks[i] = inf
    return peaks


def compare_with_compiler(
    run: RunConfig, machine: Machine, plan: RunPlan
) -> tuple[bool, str, Figures]:
    """Compiles a run for a machine; returns whether it fits, that in words, and the compiler's
    figures beside the plan's.

    Raises:
        MaxlmError: the compiler is not installed.
    """
    try:
        step = compile_step(run, machine.name)
    except DoesNotFit as error:
        return False, f"does not fit: {error.what}", {}
    fits = step.memory.peak <= machine.chip.memory
    words = f"{format_bytes(step.memory.peak)} of {format_bytes(machine.chip.memory)} a device"
    verdict = "fits" if fits else "does not fit"
    return fits, f"{verdict} by the compiler's account: {words}", compare(plan, step)
