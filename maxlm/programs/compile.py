"""A run's training step compiled for a machine that is not here."""

import importlib.util
import os
import re
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from maxlm.config import MaxlmError
from maxlm.plan.predict import Machine, RunPlan
from maxlm.plan.show import format_bytes
from maxlm.plan.topology import Topology, format_gpu_target, parse_topology
from maxlm.programs.setup import RunSetup, set_up_run
from maxlm.run import RunConfig
from maxlm.train.batch import batch_sharding

_PACKAGES = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda12", "cuda")}


def compute_peak_bytes(memory: Any) -> int:
    """Returns the main memory of each device that a program needs; ``memory``: JAX's account of it,
    ``compiled.memory_analysis()``, whose aliases are outputs that take an argument's place."""
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return held + memory.output_size_in_bytes - memory.alias_size_in_bytes


@dataclass(frozen=True)
class CompiledStep:
    """A training step as the machine's own compiler made it."""

    setup: RunSetup
    compiled: Any
    """``jax.stages.Compiled``."""
    seconds: float
    """Seconds to trace and to compile it."""


class DoesNotFit(MaxlmError):
    """A program that the compiler finds no room for."""


def compile_step(config: RunConfig, topology: str) -> CompiledStep:
    """Compile a run's training step ahead of time for a topology, as ``parse_topology`` reads it;
    no accelerator is needed.

    Keep JAX on this machine's CPU (``JAX_PLATFORMS=cpu``) before anything touches a device. Raises
    DoesNotFit for too little memory (TPUs; a GPU's compiler lays out any amount).
    """
    machine, began = parse_topology(topology), perf_counter()
    setup = set_up_run(config, get_topology_devices(machine))
    # Before the mesh becomes current: what it evaluates would run on devices that do not exist.
    arguments = setup.abstract_state, make_abstract_batch(setup)
    step: Any = setup.jit_train_step()
    with jax.set_mesh(setup.mesh):
        lowered = step.__wrapped__.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"required[\w ]*\(\S+\) exceeds available HBM \(\S+\)", str(error))
        words = found.group() if found else str(error).splitlines()[0]
        raise DoesNotFit(f"the compiler finds no room: {words}") from None
    return CompiledStep(setup, compiled, perf_counter() - began)


def check_fit_by_compiling(run: RunConfig, machine: Machine, plan: RunPlan) -> dict[str, Any]:
    """Compiles a run for a machine; returns whether it fits by its compiler's account, in words
    too, seconds to compile (None: no room) and the parts of a device's memory in bytes, beside the
    plan's (None: not planned on its own)."""
    try:
        step = compile_step(run, machine.name)
    except DoesNotFit as error:
        words = f"does not fit: {error.what}"
        return {"fits": False, "words": words, "seconds": None, "figures": {}}
    memory, limit, held = step.compiled.memory_analysis(), machine.chip.memory_bytes, plan.memory
    total, transient, peak = held.total, held.transient_bytes, compute_peak_bytes(memory)
    figures = {
        "arguments: state and batch": (float(total - transient), memory.argument_size_in_bytes),
        "outputs": (None, memory.output_size_in_bytes),
        "outputs in arguments' place": (None, memory.alias_size_in_bytes),
        "temporaries": (float(transient), memory.temp_size_in_bytes),
        "peak": (float(total), peak),
    }
    words = f"{'fits' if peak <= limit else 'does not fit'} by the compiler's account: "
    words += f"{format_bytes(peak)} of {format_bytes(limit)} a device"
    sizes = {name: {"plan": ours, "compiler": own} for name, (ours, own) in figures.items()}
    return {"fits": peak <= limit, "words": words, "seconds": step.seconds, "figures": sizes}


def make_abstract_batch(setup: RunSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Makes a training batch [micro-batches, rows, ...] without its data."""
    data, micro = setup.config.data, setup.config.train.micro_batches
    return {
        name: jax.ShapeDtypeStruct(
            (micro, data.batch_size // micro, *array.shape),
            array.dtype,
            sharding=batch_sharding(setup.placed.compute, setup.mesh, array.axes),
        )
        for name, array in setup.config.task.batch_arrays(data.seq_len).items()
    }


def get_topology_devices(topology: Topology) -> list[Any]:
    """Returns devices to compile for; nothing can be run on them.

    Sets two variables of the TPU library's, unless they are set: not to ask a metadata server
    which TPU this is, and not to insist on being the only process that loads it.
    """
    if topology.platform == "cpu":
        if len(here := jax.devices("cpu")) < topology.devices:
            what = f"{topology.devices} CPU devices, {len(here)} here"
            raise MaxlmError(what, fix=f"set JAX_NUM_CPU_DEVICES={topology.devices}")
        return here[: topology.devices]
    if not has_compiler(topology.platform):
        what = f"no compiler for {topology.platform.upper()}s is installed"
        extra = _PACKAGES[topology.platform][1]
        raise MaxlmError(what, fix=f"pip install -c constraints.txt 'maxlm[{extra}]'")
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
        what = f"the compiler knows no {topology.compiler_name} ({str(error).splitlines()[0]})"
        raise MaxlmError(what, fix="name a shape that exists, such as v5p:4x4x2") from error


def has_compiler(platform: str) -> bool:
    """Whether the packages that compile for a platform are installed; a CPU's come with JAX."""
    if platform == "cpu":
        return True
    try:
        return importlib.util.find_spec(_PACKAGES[platform][0]) is not None
    except ModuleNotFoundError:
        return False
