"""A run's training step compiled for a machine that is not here."""

import importlib.util
import os
import re
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.plan.topology import Topology, format_gpu_target, parse_topology
from maxlm.programs.setup import RunSetup, set_up_run
from maxlm.run import RunConfig
from maxlm.train.batch import batch_sharding

_PACKAGES = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda12", "cuda")}


@dataclass(frozen=True)
class CompiledMemory:
    """A compiled program's main memory on each device, bytes."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Bytes of the output that take an argument's place."""
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def read_compiled_memory(compiled: Any) -> CompiledMemory:
    """Reads ``compiled.memory_analysis()``."""
    stats, parts = compiled.memory_analysis(), ("argument", "output", "alias", "temp")
    return CompiledMemory(*(getattr(stats, f"{part}_size_in_bytes") for part in parts))


@dataclass(frozen=True)
class CompiledStep:
    """A training step as the machine's own compiler made it."""

    setup: RunSetup
    compiled: Any
    """``jax.stages.Compiled``."""
    seconds: float
    """Seconds to trace and to compile it."""

    @property
    def memory(self) -> CompiledMemory:
        return read_compiled_memory(self.compiled)


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


def make_abstract_batch(setup: RunSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Makes a training batch [micro-batches, rows, ...] without its data."""
    data, micro = setup.config.data, setup.config.train.micro_batches
    lead = (micro, data.batch_size // micro)
    return {
        name: jax.ShapeDtypeStruct(
            (*lead, *array.shape),
            array.dtype,
            sharding=batch_sharding(setup.compute, setup.mesh, array.axes),
        )
        for name, array in setup.config.task.batch_arrays(data.seq_len).items()
    }


def get_topology_devices(topology: Topology) -> list[Any]:
    """Returns devices to compile for; nothing can be run on them.

    Sets two variables of the TPU library's, unless they are set: not to ask a metadata server
    which TPU this is, and not to insist on being the only process that loads it.
    """
    from jax.experimental.topologies import get_topology_desc

    if topology.platform == "cpu":
        here = jax.devices("cpu")
        if len(here) < topology.devices:
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
