"""The plan of a run on a machine: memory, communication and time, before it starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.models.dtypes import resolve_compute_dtype
from maxlm.plan.communication import list_collectives
from maxlm.plan.generation import ExpectedLengths, GenerationPlanner
from maxlm.plan.goodput import Goodput, Reliability, estimate_goodput
from maxlm.plan.known_errors import KnownTimeError, find_known_time_errors
from maxlm.plan.layout import RunLayout, compute_run_layout
from maxlm.plan.machine import SAFE_FILL_RATIO, Machine, select_matmul_dtype
from maxlm.plan.memory import DeviceMemory, estimate_memory
from maxlm.plan.network import Network, PlannedCollective
from maxlm.plan.phases import ExtraPhases, estimate_extra_phases
from maxlm.plan.timing import EFFICIENCY, StepTime, estimate_time
from maxlm.plan.torus import find_torus_dimensions
from maxlm.plan.workload import MeshPartitioning, Number, RunWorkload, StepShape
from maxlm.run.config import RunConfig, resolve_micro_batches
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import MESH_AXES

TRAINING_STEP = "training step"
"""Name of the phase in which the trained model learns."""


@dataclass(frozen=True, kw_only=True)
class CollectiveCost(PlannedCollective):
    """A collective of one plan, with what it costs."""

    devices: int
    """Devices in a group."""
    link: str | None
    sent_bytes: float
    """Bytes that each device sends in a step."""
    seconds: float | None
    """Seconds of a step."""

    def to_json(self) -> JsonObject:
        """Returns plain data; ``content`` is called "what" there."""
        fields = asdict(self)
        return {"what": fields.pop("content"), **fields}


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
    extra: ExtraPhases = field(default_factory=ExtraPhases)
    """What the run does beside its training steps."""

    def __post_init__(self) -> None:
        layout = self.layout
        limit = None
        peak_flops = None
        if self.machine is not None:
            limit = self.machine.chip.memory_bytes
            peak_flops = self.machine.chip.peak_flops["bf16"] * layout.devices
        bytes_by_phase = {
            TRAINING_STEP: float(self.memory.total),
            **{phase.name: float(phase.total_bytes) for phase in self.extra.phases},
        }
        self.bytes_by_phase = bytes_by_phase
        """Bytes on each device at the peak of each phase of the run."""
        self.peak_phase = max(bytes_by_phase, key=bytes_by_phase.__getitem__)
        """The phase that needs most memory."""
        total = bytes_by_phase[self.peak_phase]
        self.peak_bytes = total
        """Bytes on each device at the run's peak."""
        self.checkpoint_every = self.shape.work.config.checkpoint.every_steps
        self.memory_limit_bytes = limit
        """Bytes of main memory that a program may use."""
        self.fits = None if limit is None else total <= limit
        self.barely_fits = (
            limit is not None and SAFE_FILL_RATIO * limit < total <= limit
        )
        """Whether the run fits by less than the plan may be wrong."""
        self.step_seconds = None
        """Seconds of a training step alone."""
        self.mean_step_seconds = None
        """Seconds from a step to the next on average, all phases of the run
        included."""
        self.longest_step_seconds = None
        """Seconds from a step to the next where a rollout lies between, or passes
        over rows."""
        self.tokens_per_second = None
        """Tokens of training steps a second, other phases left out."""
        if self.time is not None:
            extra_seconds = float(self.extra.total_seconds)
            self.step_seconds = float(self.time.total)
            self.mean_step_seconds = self.step_seconds + extra_seconds
            rollout_seconds = self.steps_per_rollout * extra_seconds
            self.longest_step_seconds = self.step_seconds + rollout_seconds
            self.tokens_per_second = layout.tokens_per_step / self.step_seconds
        self.total_peak_flops_per_second = peak_flops
        """FLOP/s of all devices together."""

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that a rollout serves; 1: nothing is generated."""
        config = self.shape.work.config
        data = config.data
        generation = config.task.generation(data.seq_len, data.batch_size)
        return 1 if generation is None else generation.steps_per_rollout

    def mfu(self, *, full_attention: bool = False) -> float | None:
        """Share of the machine's peak spent on the model's own work."""
        if self.total_peak_flops_per_second is None or self.tokens_per_second is None:
            return None
        flops = self.layout.flops_per_token
        if full_attention:
            flops = self.layout.flops_per_token_full_attention
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
        step_seconds = self.mean_step_seconds
        if step_seconds is None or self.goodput is None or not self.goodput.best:
            return None
        steps = self.layout.tokens_total / self.layout.tokens_per_step
        seconds = steps * step_seconds / self.goodput.best
        return seconds / 3600

    def to_json(self) -> JsonObject:
        """Returns plain data, the layout's first."""
        limit = self.memory_limit_bytes
        margin = None if limit is None else limit - float(self.memory.total)
        known_errors = [
            {"kind": error.kind, "plans": error.plans, "deviation": error.deviation}
            for error in self.known_time_errors
        ]
        return {
            **asdict(self.layout),
            "remat": self.shape.remat,
            "micro_batches": self.shape.micro_batches,
            "memory": {**self.memory.to_json(), "limit": limit, "margin": margin},
            "phases": [phase.to_json() for phase in self.extra.phases],
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "steps_per_rollout": self.steps_per_rollout,
            "checkpoint_every": self.checkpoint_every,
            "fits": self.fits,
            "collectives": [collective.to_json() for collective in self.collectives],
            "machine": None if self.machine is None else self.machine.to_json(),
            "time": None if self.time is None else self._time_to_json(self.time),
            "known_time_errors": known_errors,
            "goodput": None if self.goodput is None else asdict(self.goodput),
        }

    def _time_to_json(self, time: StepTime) -> dict[str, float | None]:
        parts = {part: float(seconds) for part, seconds in asdict(time).items()}
        hours = self.run_hours
        return {
            **parts,
            "step": self.step_seconds,
            "mean_step": self.mean_step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu(),
            "mfu_full_attention": self.mfu(full_attention=True),
            "run_hours": hours,
            "device_hours": None if hours is None else hours * self.layout.devices,
        }


def plan_run(
    config: RunConfig,
    machine: Machine | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    reliability: Reliability = Reliability(),
    lengths: ExpectedLengths = ExpectedLengths(),
) -> RunPlan:
    """Plans a run.

    Args:
        machine: where; None: bytes alone.
        sizes: mesh axis → devices; default: the config's mesh on the machine.
        reliability: of the machine, for goodput.
        lengths: that are expected of the sequences that a task generates.

    Raises:
        MaxlmError: something does not fit together. Too little memory is no error.
    """
    topology = None if machine is None else machine.topology
    platform = "tpu" if topology is None else topology.platform
    dtype = resolve_compute_dtype(config.compute_dtype, platform)
    if sizes is None:
        assert machine is not None
        sizes = machine.resolve_mesh_sizes(config)
    config = resolve_micro_batches(config, sizes)
    links = None if machine is None else _describe_links(machine, config, sizes)
    layout = compute_run_layout(config, sizes, links)
    work = RunWorkload(config, dtype)
    shape = StepShape(
        work, sizes, config.train.micro_batches, config.model.remat, topology
    )
    planner = GenerationPlanner(config, machine, lengths)
    memory, collectives, time, extra = estimate_costs(shape, machine, planner)
    goodput = None
    if time is not None:
        state_bytes = float(memory.parameters + memory.optimizer + memory.average)
        goodput = estimate_goodput(
            layout.devices,
            state_bytes,
            float(time.total + extra.total_seconds),
            config.checkpoint.every_steps,
            reliability,
        )
    costs = [
        _estimate_collective_cost(collective, shape.split, machine)
        for collective in collectives
    ]
    return RunPlan(
        layout=layout,
        machine=machine,
        shape=shape,
        memory=memory,
        collectives=tuple(cost for cost in costs if cost.sent_bytes > 0),
        time=time,
        goodput=goodput,
        extra=extra,
    )


def _describe_links(
    machine: Machine, config: RunConfig, sizes: Mapping[str, int]
) -> dict[str, str]:
    """Describes the links of each mesh axis of several devices: on a TPU, with the
    dimensions of the torus that it lies along."""
    topology = machine.topology
    split = MeshPartitioning(config, sizes)
    links = {
        axis: machine.describe_link((axis,), split)
        for axis in MESH_AXES
        if sizes[axis] > 1
    }
    # Devices that are here need not be all of a slice, whose shape their coordinates
    # tell.
    if topology.platform != "tpu" or topology.devices != prod(sizes.values()):
        return links
    for axis, dimensions in find_torus_dimensions(topology, sizes).items():
        if dimensions:
            links[axis] += f" along {dimensions}"
    return links


class RunCosts(NamedTuple):
    """Costs of a run, or of each of many."""

    memory: DeviceMemory
    collectives: tuple[PlannedCollective, ...]
    time: StepTime | None
    """None: no machine was named."""
    extra: ExtraPhases

    @property
    def peak_bytes(self) -> Number:
        """Bytes on each device at the peak of the phase that needs most."""
        peak = self.memory.total
        for phase in self.extra.phases:
            peak = np.maximum(peak, phase.total_bytes)
        return peak

    @property
    def mean_step_seconds(self) -> Number:
        """Seconds from a step to the next on average; needs a machine."""
        assert self.time is not None
        return self.time.total + self.extra.total_seconds


def estimate_costs(
    shape: StepShape, machine: Machine | None, planner: GenerationPlanner
) -> RunCosts:
    """Estimates what a run costs, or each of many.

    Args:
        planner: of the run's generation on this machine.
    """
    extra = estimate_extra_phases(shape, machine, planner)
    memory = replace(estimate_memory(shape), caches=extra.resident_bytes)
    topology = None if machine is None else machine.topology
    # What the loss keeps of models that are trained beside the run's own is there
    # together with what it keeps of this.
    auxiliary_shapes = [
        StepShape(work, shape.split.sizes, shape.micro_batches, shape.remat, topology)
        for work in shape.work.auxiliary_models.values()
    ]
    for auxiliary_shape in auxiliary_shapes:
        auxiliary = estimate_memory(auxiliary_shape)
        memory = replace(
            memory,
            gradients=memory.gradients + auxiliary.gradients,
            activations=memory.activations + auxiliary.activations,
        )
    collectives = list_collectives(shape)
    if machine is None:
        return RunCosts(memory, collectives, None, extra)
    time = estimate_time(
        shape,
        machine,
        collectives,
        dtype=select_matmul_dtype(machine.chip, shape.work.dtype_bytes),
        transient_bytes=memory.transient_bytes,
    )
    for auxiliary_shape in auxiliary_shapes:
        auxiliary_time = estimate_time(
            auxiliary_shape,
            machine,
            list_collectives(auxiliary_shape),
            dtype=select_matmul_dtype(machine.chip, shape.work.dtype_bytes),
        )
        time = time.plus(auxiliary_time)
    return RunCosts(memory, collectives, time, extra)


def _estimate_collective_cost(
    collective: PlannedCollective, split: MeshPartitioning, network: Network | None
) -> CollectiveCost:
    axes = tuple(
        axis for axis in MESH_AXES if axis in collective.axes and split.sizes[axis] > 1
    )
    link = None
    seconds = None
    if network is not None:
        link = network.describe_link(axes, split)
        one_run = network.estimate_seconds(
            collective.kind, collective.axes, collective.whole_bytes, split
        )
        efficiency = EFFICIENCY[network.chip.family].network
        seconds = float(collective.count * one_run / efficiency)
    return CollectiveCost(
        content=collective.content,
        kind=collective.kind,
        axes=axes,
        whole_bytes=float(collective.whole_bytes),
        count=round(float(collective.count)),
        phase=collective.phase,
        waits=collective.waits,
        devices=round(float(split.num_devices(axes))),
        link=link,
        sent_bytes=float(collective.wire_bytes(split)),
        seconds=seconds,
    )
