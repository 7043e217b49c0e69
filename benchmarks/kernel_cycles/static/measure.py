"""Static costs of a function on a chip: compile, read the schedule, run its control
flow."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_cycles.static.compile import environment
from benchmarks.kernel_cycles.static.costs import CallCosts, call_costs
from benchmarks.kernel_cycles.static.prefetch import KernelCall
from benchmarks.kernel_cycles.static.schedule import read_schedules
from pallas_kernels.chips import CHIPS


class CompileError(Exception):
    """The compiler refused: too much VMEM, an unsupported shape."""


class CompilerKilled(CompileError):
    """From outside, for want of memory perhaps: no property of the program."""


_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}


@dataclass(frozen=True)
class Spec:
    """What to compile, in words that another process understands."""

    function: str
    """"module:function", which returns (callable, its arguments):
    ``jax.ShapeDtypeStruct``, or arrays where a kernel's grid or loops follow their
    values (segments, group sizes)."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments, such as JSON can carry."""


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def measure(spec: Spec, chip: str) -> CallCosts:
    """Compile a function for a chip and count its kernels' cycles: see
    :func:`measure_program`, which returns the program's text too."""
    costs, _ = measure_program(spec, chip)
    return costs


def measure_program(spec: Spec, chip: str) -> tuple[CallCosts, str]:
    """Compile a function for a chip, count its kernels' cycles, and return these and
    the scheduled program's text. Takes seconds, and a process.

    Args:
        chip: of ``CHIPS``.

    Raises:
        ValueError: an unknown chip, no libtpu, a kernel whose control flow cannot be
            followed.
        CompileError: with the compiler's message; CompilerKilled where it could not
            finish.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r}: not one of {', '.join(CHIPS)}")
    if not has_compiler():
        raise ValueError("no TPU compiler: pip install libtpu")
    request = json.dumps(
        {
            "function": spec.function,
            "kwargs": dict(spec.kwargs),
            "topology": CHIPS[chip].topology,
        }
    )
    with tempfile.TemporaryDirectory(prefix="pallas_kernels_") as name:
        folder = Path(name)
        (folder / "dump").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.kernel_cycles.static.compile", name],
            input=request,
            text=True,
            capture_output=True,
            env=environment(folder),
        )
        if done.returncode in _FROM_OUTSIDE:
            raise CompilerKilled(
                f"compiler killed by {signal.Signals(-done.returncode).name}"
            )
        if done.returncode:
            raise CompileError(_reason(done.stderr))
        result = json.loads((folder / "result.json").read_text())
        calls = [KernelCall(shapes) for shapes in result["shapes"]]
        with np.load(folder / "values.npz") as values:
            for key in values.files:
                i, j = map(int, key.split("_"))
                calls[i].values[j] = values[key]
        text = (folder / "hlo.txt").read_text()
        costs = call_costs(
            read_schedules(folder / "dump"),
            text,
            calls,
            CHIPS[chip],
            result["temp_bytes"],
        )
        return costs, text


def _reason(stderr: str) -> str:
    """The exception at the end of a traceback, without JAX's note on how it filtered
    that."""
    end = stderr.rpartition("Traceback (most recent call last)")[2]
    raised = re.search(r"^\w[\w.]*: .*", end, re.MULTILINE | re.DOTALL)
    return (raised[0] if raised else stderr).split("\n-----")[0].strip()[:2000]
