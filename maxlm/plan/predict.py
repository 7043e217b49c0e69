"""The plan of a run on a machine: memory, communication and time, before it starts."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np

from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.plan.communication import list_collectives
from maxlm.plan.goodput import Goodput, Reliability, estimate_goodput
from maxlm.plan.hardware import CHIPS, Chip, find_chip, measure_cpu
from maxlm.plan.known_errors import KnownTimeError, find_known_time_errors
from maxlm.plan.layout import RunLayout, compute_run_layout
from maxlm.plan.memory import DeviceMemory, estimate_memory
from maxlm.plan.network import Network, PlannedCollective
from maxlm.plan.timing import EFFICIENCY, StepTime, estimate_time
from maxlm.plan.topology import TPUS, Topology, parse_topology
from maxlm.plan.torus import find_torus_dimensions
from maxlm.plan.workload import FP32, MeshPartitioning, RunWorkload, StepShape
from maxlm.run.config import RunConfig, resolve_micro_batches
from maxlm.sharding import MESH_AXES, mesh_sizes
from maxlm.sharding.links import check_tensor_within_host, count_slices_per_axis

# Of the memory limit, what the analytic peak may safely come to: it is off by a few per
# cent.
FILL = 0.95


@dataclass(frozen=True)
class Machine(Network):
    """The machine that a run is planned for."""

    name: str

    @classmethod
    def from_name(cls, name: str) -> "Machine":
        """Returns the machine of a name that docs/plan.md explains; a CPU is
        measured."""
        topology = parse_topology(name)
        chip = (
            measure_cpu(topology.devices)
            if topology.platform == "cpu"
            else CHIPS[topology.kind]
        )
        return cls(topology, chip, name)

    @classmethod
    def from_devices(cls, devices: Sequence[Any]) -> "Machine | None":
        """Returns the machine that these devices are; None: a kind whose figures are
        not known."""
        # Of another process's devices the memory cannot be asked for.
        own = (
            d for d in devices if getattr(d, "process_index", 0) == jax.process_index()
        )
        first = next(own, devices[0])
        chip = find_chip(first)
        if chip is None:
            return None
        with suppress(AttributeError, jax.errors.JaxRuntimeError):  # only described
            limit = (first.memory_stats() or {}).get("bytes_limit")
            chip = replace(chip, memory_bytes=float(limit or chip.memory_bytes))
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        shape = (len(devices),)
        if first.platform == "gpu":
            # Processes may have one GPU each: then a host is as many as NVLink joins.
            a_process = len(devices) // len(
                {device.process_index for device in devices}
            )
            a_host = (
                a_process
                if a_process > 1
                else min(chip.nvlink_domain_size, len(devices))
            )
            slices = 1
            shape = (len(devices) // a_host, a_host)
        elif first.platform == "tpu":
            places = np.array([device.coords for device in devices])
            sides = tuple(int(n) for n in places.max(0) - places.min(0) + 1)
            shape = sides[: TPUS[chip.name].dimensions]
        topology = Topology(first.platform, chip.name, shape, slices)
        return cls(topology, chip, topology.description)

    def mesh(self, config: RunConfig) -> dict[str, int]:
        """Returns the config's mesh; refuses slices or hosts that it cannot be laid
        along."""
        sizes = mesh_sizes(config.mesh, self.topology.devices)
        if self.topology.platform == "tpu":
            count_slices_per_axis(sizes, self.topology.slices)
        if self.topology.platform == "gpu":
            check_tensor_within_host(sizes, self.topology.shape[-1])
        return sizes

    def to_json(self) -> dict[str, Any]:
        topology, chip = self.topology, self.chip
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


@dataclass(frozen=True, kw_only=True)
class CollectiveCost(PlannedCollective):
    """The cost of a collective of one plan."""

    devices: int
    """Devices in a group."""
    link: str | None
    sent_bytes: float
    """Bytes that each device sends in a step."""
    seconds: float | None
    """Seconds of a step."""


@dataclass
class RunPlan:
    """The plan of a run. Without a machine there are no times."""

    layout: RunLayout
    machine: Machine | None
    shape: StepShape
    memory: DeviceMemory
    collectives: tuple[CollectiveCost, ...]
    time: StepTime | None
    goodput: Goodput | None

    def __post_init__(self) -> None:
        chip = self.machine and self.machine.chip
        layout = self.layout
        limit = chip and chip.memory_bytes
        total = float(self.memory.total)
        self.checkpoint_every = self.shape.work.config.checkpoint.every_steps
        self.memory_limit_bytes = limit
        """Bytes of main memory that a program may use."""
        self.fits = None if limit is None else total <= limit
        self.barely_fits = limit is not None and FILL * limit < total <= limit
        """Whether the run fits by less than the plan may be wrong."""
        self.step_seconds = seconds = self.time and float(self.time.total)
        self.tokens_per_second = seconds and layout.tokens_per_step / seconds
        self.total_peak_flops_per_second = (
            chip and chip.peak_flops["bf16"] * layout.devices
        )
        """FLOP/s of all devices together."""

    def mfu(self, *, full_attention: bool = False) -> float | None:
        """Share of the machine's peak spent on the model's own work."""
        if self.total_peak_flops_per_second is None or self.tokens_per_second is None:
            return None
        layout = self.layout
        flops = (
            layout.flops_per_token_full_attention
            if full_attention
            else layout.flops_per_token
        )
        return self.tokens_per_second * flops / self.total_peak_flops_per_second

    @property
    def known_time_errors(self) -> tuple[KnownTimeError, ...]:
        """Known errors of the predicted times; none without a machine, which has no
        times."""
        if self.machine is None:
            return ()
        work = self.shape.work
        return find_known_time_errors(
            self.machine.topology,
            self.layout.mesh,
            work.config.data.seq_len,
            has_experts=work.experts is not None,
        )

    @property
    def run_hours(self) -> float | None:
        """Hours of the whole run, failures included, with checkpoints at the best
        interval."""
        if self.step_seconds is None or self.goodput is None or not self.goodput.best:
            return None
        steps = self.layout.tokens_total / self.layout.tokens_per_step
        return steps * self.step_seconds / self.goodput.best / 3600

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, the layout's first."""
        machine, limit, hours = self.machine, self.memory_limit_bytes, self.run_hours
        margin = None if limit is None else limit - float(self.memory.total)
        return {
            **asdict(self.layout),
            "remat": self.shape.remat,
            "micro_batches": self.shape.micro_batches,
            "memory": {**self.memory.to_json(), "limit": limit, "margin": margin},
            "checkpoint_every": self.checkpoint_every,
            "fits": self.fits,
            "collectives": [asdict(sent) for sent in self.collectives],
            "machine": machine and machine.to_json(),
            "time": self.time
            and {
                **{part: float(value) for part, value in asdict(self.time).items()},
                "step": self.step_seconds,
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu(),
                "mfu_full_attention": self.mfu(full_attention=True),
                "run_hours": hours,
                "device_hours": None if hours is None else hours * self.layout.devices,
            },
            "known_time_errors": [
                {"kind": error.kind, "plans": error.plans, "deviation": error.deviation}
                for error in self.known_time_errors
            ],
            "goodput": self.goodput and asdict(self.goodput),
        }


def plan_run(
    config: RunConfig,
    machine: Machine | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    reliability: Reliability = Reliability(),
) -> RunPlan:
    """Plans a run; refuses whatever does not fit together, but not too little memory.

    Args:
        machine: where; None: bytes alone.
        sizes: mesh axis → devices; default: the config's mesh on the machine.
        reliability: of the machine, for goodput.
    """
    topology = machine and machine.topology
    dtype = resolve_compute_dtype(
        config.compute_dtype, topology.platform if topology else "tpu"
    )
    if sizes is None:
        assert machine is not None
        sizes = machine.mesh(config)
    config = resolve_micro_batches(config, sizes)
    links = None if machine is None else _describe_links(machine, config, sizes)
    layout = compute_run_layout(config, sizes, links)
    work = RunWorkload(config, dtype)
    micro = config.train.micro_batches
    shape = StepShape(work, sizes, micro, config.model.remat, topology)
    held, sends, time = estimate_costs(shape, machine)
    good = None
    if time:
        state = float(held.parameters + held.optimizer + held.average)
        good = estimate_goodput(
            layout.devices,
            state,
            float(time.total),
            config.checkpoint.every_steps,
            reliability,
        )
    costs = (_cost(c, shape.split, machine) for c in sends)
    sent = tuple(cost for cost in costs if cost.sent_bytes > 0)
    return RunPlan(layout, machine, shape, held, sent, time, good)


def _describe_links(
    machine: Machine, config: RunConfig, sizes: Mapping[str, int]
) -> dict[str, str]:
    """Describes the links of each mesh axis of several devices: on a TPU, with the
    dimensions of the torus that it lies along."""
    topology = machine.topology
    split = MeshPartitioning(config, sizes)
    links = {
        axis: machine.link((axis,), split) for axis in MESH_AXES if sizes[axis] > 1
    }
    # Devices that are here need not be all of a slice, whose shape their coordinates
    # tell.
    if topology.platform != "tpu" or topology.devices != prod(sizes.values()):
        return links
    for axis, dimensions in find_torus_dimensions(topology, sizes).items():
        if dimensions:
            links[axis] += f" along {dimensions}"
    return links


def estimate_costs(
    shape: StepShape, machine: Machine | None
) -> tuple[DeviceMemory, tuple[PlannedCollective, ...], StepTime | None]:
    """Returns memory, collectives and, on a machine, the time of a run, or of each of
    many."""
    held = estimate_memory(shape)
    sends = list_collectives(shape)
    if machine is None:
        return held, sends, None
    dtype = select_matmul_dtype(machine.chip, shape.work.dtype_bytes)
    time = estimate_time(
        shape, machine, sends, dtype=dtype, transient_bytes=held.transient_bytes
    )
    return held, sends, time


def select_matmul_dtype(chip: Chip, dtype_bytes: int) -> str:
    """Returns the key in ``Chip.peak_flops`` of products in a compute dtype of so many
    bytes."""
    # By JAX's default precision fp32 products are TF32 on NVIDIA's GPUs, and one pass
    # of bf16 on TPUs.
    wanted = ("fp32", "tf32", "bf16") if dtype_bytes == FP32 else ("bf16",)
    return next(dtype for dtype in wanted if dtype in chip.peak_flops)


def _cost(
    c: PlannedCollective, split: MeshPartitioning, network: Network | None
) -> CollectiveCost:
    axes = tuple(axis for axis in MESH_AXES if axis in c.axes and split.sizes[axis] > 1)
    seconds = None
    if network:
        one = network.seconds(c.kind, c.axes, c.whole_bytes, split)
        seconds = float(c.count * one / EFFICIENCY[network.chip.family].network)
    return CollectiveCost(
        *(
            c.what,
            c.kind,
            axes,
            float(c.whole_bytes),
            round(float(c.count)),
            c.phase,
            c.waits,
        ),
        devices=round(float(split.num_devices(axes))),
        link=network.link(axes, split) if network else None,
        sent_bytes=float(c.wire_bytes(split)),
        seconds=seconds,
    )
