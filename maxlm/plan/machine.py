"""The machine that a run is planned for."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from maxlm.plan.hardware import CHIPS, Chip, find_chip, measure_cpu
from maxlm.plan.network import Network
from maxlm.plan.timing import EFFICIENCY
from maxlm.plan.topology import TPUS, Topology, parse_topology
from maxlm.plan.workload import FP32
from maxlm.run.config import RunConfig
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import mesh_sizes
from maxlm.sharding.links import check_tensor_within_host, count_slices_per_axis

# Share of the memory limit that the analytic peak may safely come to: it is off by a
# few per cent.
SAFE_FILL_RATIO = 0.95


@dataclass(frozen=True)
class Machine(Network):
    """The machine that a run is planned for."""

    name: str

    @classmethod
    def from_name(cls, name: str) -> "Machine":
        """Returns the machine of a name that docs/plan.md explains; a CPU is
        measured."""
        topology = parse_topology(name)
        if topology.platform == "cpu":
            chip = measure_cpu(topology.devices)
        else:
            chip = CHIPS[topology.kind]
        return cls(topology, chip, name)

    @classmethod
    def from_devices(cls, devices: Sequence[Any]) -> "Machine | None":
        """Returns the machine that these devices, real or only described, are; None: a
        kind whose figures are not known."""
        # Of another process's devices the memory cannot be asked for. Devices that are
        # only described, for a compiler, may belong to no process.
        process = jax.process_index()
        local_devices = [
            device
            for device in devices
            if getattr(device, "process_index", 0) == process
        ]
        first = local_devices[0] if local_devices else devices[0]
        chip = find_chip(first)
        if chip is None:
            return None
        # Devices that are only described have no memory to ask for.
        with suppress(AttributeError, jax.errors.JaxRuntimeError):
            limit = (first.memory_stats() or {}).get("bytes_limit")
            chip = replace(chip, memory_bytes=float(limit or chip.memory_bytes))
        # Sides of the torus, or hosts and their GPUs.
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        shape = (len(devices),)
        if first.platform == "gpu":
            num_processes = len({device.process_index for device in devices})
            gpus_per_host = len(devices) // num_processes
            if gpus_per_host == 1:
                # Each process has one GPU: a host is as many as NVLink joins.
                gpus_per_host = min(chip.nvlink_domain_size, len(devices))
            slices = 1
            shape = (len(devices) // gpus_per_host, gpus_per_host)
        elif first.platform == "tpu":
            coords = np.array([device.coords for device in devices])  # [devices, 3]
            sides = coords.max(0) - coords.min(0) + 1
            # There are three coordinates, also where the torus has two dimensions.
            dimensions = TPUS[chip.name].dimensions
            shape = tuple(int(side) for side in sides)[:dimensions]
        topology = Topology(first.platform, chip.name, shape, slices)
        return cls(topology, chip, topology.description)

    def resolve_mesh_sizes(self, config: RunConfig) -> dict[str, int]:
        """Returns the config's mesh; refuses slices or hosts that it cannot be laid
        along."""
        sizes = mesh_sizes(config.mesh, self.topology.devices)
        if self.topology.platform == "tpu":
            count_slices_per_axis(sizes, self.topology.slices)
        if self.topology.platform == "gpu":
            check_tensor_within_host(sizes, self.topology.shape[-1])
        return sizes

    def to_json(self) -> JsonObject:
        topology = self.topology
        chip = self.chip
        return {
            "name": self.name,
            "words": topology.description,
            "chip": chip.name,
            "shape": list(topology.shape),
            "slices": topology.slices,
            "memory": chip.memory_bytes,
            "bandwidth": chip.memory_bandwidth,
            "read_bandwidth": chip.read_bandwidth or chip.memory_bandwidth,
            "sources": chip.sources,
            "peak": chip.peak_flops["bf16"],
            "efficiency": asdict(EFFICIENCY[chip.family]),
        }


def select_matmul_dtype(chip: Chip, dtype_bytes: int) -> str:
    """Returns the key in ``Chip.peak_flops`` of products in a compute dtype of so many
    bytes."""
    # By JAX's default precision fp32 products are TF32 on NVIDIA's GPUs, and one pass
    # of bf16 on TPUs.
    dtypes = ("fp32", "tf32", "bf16") if dtype_bytes == FP32 else ("bf16",)
    return next(dtype for dtype in dtypes if dtype in chip.peak_flops)
