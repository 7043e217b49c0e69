"""Plans verified by a compiler."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from maxlm.plan.predict import Machine, RunPlan
from maxlm.plan.show import format_bytes
from maxlm.programs.compile import DoesNotFit, compile_step
from maxlm.run import RunConfig


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
