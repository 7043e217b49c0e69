"""A run's training step compiled for a machine that is not here."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any, Protocol

import jax
from jax.experimental.topologies import get_topology_desc

from maxlm.config import MaxlmError
from maxlm.plan.compiled.compare import (
    CompilerVerdict,
    PlannedAndCompiled,
    compare_collectives,
    compare_products,
)
from maxlm.plan.compiled.cost import CompiledCost, read_compiled_cost
from maxlm.plan.machine import Machine
from maxlm.plan.predict import RunPlan
from maxlm.plan.search import Candidate
from maxlm.plan.show import format_bytes
from maxlm.plan.topology import Topology, format_gpu_target, parse_topology
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import batch_sharding
from maxlm.run.setup import RunSetup, set_up_run

# Platform → the package with its compiler, and maxlm's extra that installs it.
_PACKAGES = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda12", "cuda")}


class MemoryAnalysis(Protocol):
    """JAX's account of a program's memory, ``compiled.memory_analysis()``, in bytes of
    each device."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    alias_size_in_bytes: int
    """Outputs that take an argument's place."""


def compute_peak_bytes(memory: MemoryAnalysis) -> int:
    """Returns the bytes of main memory of each device that a program needs."""
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


@dataclass(frozen=True)
class CompiledStep:
    """A training step as the machine's own compiler made it."""

    setup: RunSetup
    compiled: jax.stages.Compiled
    seconds: float
    """Seconds to trace and to compile it."""

    @property
    def memory(self) -> MemoryAnalysis:
        """The compiler's account of the program's memory."""
        memory = self.compiled.memory_analysis()
        assert memory is not None
        return memory

    @property
    def peak_bytes(self) -> int:
        """Bytes of main memory that each device needs."""
        return compute_peak_bytes(self.memory)

    def read_cost(self) -> CompiledCost:
        """Reads a device's products and collectives out of the program's text."""
        text = self.compiled.as_text()
        assert text is not None
        return read_compiled_cost(text, dict(self.setup.mesh.shape))


_NEEDED_MEMORY = re.compile(r"required[\w ]*\(\S+\) exceeds available HBM \(\S+\)")


class DoesNotFit(MaxlmError):
    """A program that the compiler finds no room for."""


def compile_step(config: RunConfig, topology: str) -> CompiledStep:
    """Compiles a run's training step ahead of time for a topology, as ``parse_topology``
    reads it; no accelerator is needed.

    Keep JAX on this machine's CPU (``JAX_PLATFORMS=cpu``) before anything touches a
    device. Raises DoesNotFit for too little memory (TPUs; a GPU's compiler lays out any
    amount).
    """
    machine = parse_topology(topology)
    began = perf_counter()
    setup = set_up_run(config, get_topology_devices(machine))
    # Before the mesh becomes current: what it evaluates would run on devices that do
    # not exist.
    arguments = (setup.abstract_state, make_abstract_batch(setup))
    # The jitted function, without what makes the mesh current for a call.
    step: Any = setup.jit_train_step()
    with jax.set_mesh(setup.mesh):
        lowered = step.__wrapped__.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _NEEDED_MEMORY.search(str(error))
        reason = match.group() if match else str(error).splitlines()[0]
        raise DoesNotFit(f"the compiler finds no room: {reason}") from None
    return CompiledStep(setup, compiled, perf_counter() - began)


def check_fit_by_compiling(
    run: RunConfig, machine: Machine, plan: RunPlan
) -> CompilerVerdict:
    """Compiles a run for a machine; returns whether it fits by its compiler's account,
    and what the compiled step holds, multiplies and sends beside the plan's figures."""
    try:
        step = compile_step(run, machine.name)
    except DoesNotFit as error:
        return CompilerVerdict(fits=False, words=f"does not fit: {error.message}")
    return compare_with_compiled_step(plan, step, machine.chip.memory_bytes)


def compare_with_compiled_step(
    plan: RunPlan, step: CompiledStep, memory_limit_bytes: float
) -> CompilerVerdict:
    """Compares a run's plan with its compiled step, as :func:`check_fit_by_compiling`
    does."""
    peak = step.peak_bytes
    cost = step.read_cost()
    fits = peak <= memory_limit_bytes
    verdict = "fits" if fits else "does not fit"
    sizes = f"{format_bytes(peak)} of {format_bytes(memory_limit_bytes)} a device"
    return CompilerVerdict(
        fits=fits,
        words=f"{verdict} by the compiler's account: {sizes}",
        seconds=step.seconds,
        figures=_compare_memory(plan, step),
        products=compare_products(plan, cost),
        collectives=compare_collectives(plan.collectives, cost),
        unknown_loops=cost.unknown_loops,
    )


def _compare_memory(plan: RunPlan, step: CompiledStep) -> dict[str, PlannedAndCompiled]:
    """Compares parts of a device's memory, in bytes."""
    compiled = step.memory
    total = float(plan.memory.total)
    transient = float(plan.memory.transient_bytes)
    return {
        "arguments: state and batch": PlannedAndCompiled(
            total - transient, compiled.argument_size_in_bytes
        ),
        "outputs": PlannedAndCompiled(None, compiled.output_size_in_bytes),
        "outputs in arguments' place": PlannedAndCompiled(
            None, compiled.alias_size_in_bytes
        ),
        "temporaries": PlannedAndCompiled(transient, compiled.temp_size_in_bytes),
        "peak": PlannedAndCompiled(total, step.peak_bytes),
    }


def compile_candidate_peaks(
    run: RunConfig, machine: Machine, candidates: Sequence[Candidate]
) -> list[float]:
    """Compiles candidates of a search one by one; returns the bytes that each needs on
    a device by the compiler's account, infinite where it finds no room."""
    peaks = []
    for candidate in candidates:
        try:
            step = compile_step(candidate.apply(run), machine.name)
        except DoesNotFit:
            peaks.append(inf)
        else:
            peaks.append(float(step.peak_bytes))
    return peaks


def make_abstract_batch(setup: RunSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Makes a training batch [micro-batches, rows, ...] without its data."""
    data = setup.config.data
    micro_batches = setup.config.train.micro_batches
    rows = data.batch_size // micro_batches
    batch = {}
    for name, array in setup.config.batch_arrays.items():
        batch[name] = jax.ShapeDtypeStruct(
            (micro_batches, rows, *array.shape),
            array.dtype,
            sharding=batch_sharding(setup.placed.compute, setup.mesh, array.axes),
        )
    return batch


def get_topology_devices(topology: Topology) -> list[Any]:
    """Returns devices to compile for; nothing can be run on them.

    Sets two variables of the TPU library's, unless they are set: not to ask a metadata
    server which TPU this is, and not to insist on being the only process that loads it.
    """
    if topology.platform == "cpu":
        here = jax.devices("cpu")
        if len(here) < topology.devices:
            message = f"{topology.devices} CPU devices, {len(here)} here"
            raise MaxlmError(message, fix=f"set JAX_NUM_CPU_DEVICES={topology.devices}")
        return here[: topology.devices]
    if not has_compiler(topology.platform):
        message = f"no compiler for {topology.platform.upper()}s is installed"
        _, extra = _PACKAGES[topology.platform]
        fix = f"pip install -c constraints.txt 'maxlm[{extra}]'"
        raise MaxlmError(message, fix=fix)
    try:
        if topology.platform == "tpu":
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
            return get_topology_desc(topology.compiler_name, "tpu", **slices).devices
        jax.devices("cpu")  # plugins are found when the first backend starts
        target = format_gpu_target(topology.kind)
        return get_topology_desc(
            platform="cuda", topology=topology.compiler_name, target_config=target
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        message = f"the compiler knows no {topology.compiler_name} ({reason})"
        fix = "name a shape that exists, such as v5p:4x4x2"
        raise MaxlmError(message, fix=fix) from error


def has_compiler(platform: str) -> bool:
    """Returns whether the packages that compile for a platform are installed; a CPU's
    come with JAX."""
    if platform == "cpu":
        return True
    package, _ = _PACKAGES[platform]
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False
