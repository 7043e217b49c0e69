"""What a run does beside its training steps: a task's generation and its forward passes
(``tasks/extra_work.py``), as phases with memory and time of their own.

All that is stored between steps stays on the devices in every phase: parameters, the
optimizer's state, averages, frozen models.
"""

from copy import copy
from dataclasses import dataclass, field

import numpy as np

from maxlm.config import MaxlmError
from maxlm.plan.forward import list_forward_working_set
from maxlm.plan.generation import GenerationCost, GenerationPlanner
from maxlm.plan.machine import Machine, select_matmul_dtype
from maxlm.plan.memory import count_stored_bytes
from maxlm.plan.timing import estimate_forward_seconds
from maxlm.plan.workload import (
    MeshPartitioning,
    Number,
    ScoringWorkload,
    StepShape,
)
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding import MESH_AXES
from maxlm.tasks.extra_work import ExtraPass, GenerationWork

GENERATION = "generation"
"""Name of the phase in which a task's sequences are generated."""
_STORED = ("parameters", "optimizer", "average", "frozen")


@dataclass(frozen=True)
class RunPhase:
    """A phase of a run beside its training steps, on one mesh or on each of many."""

    name: str
    tokens: float
    """Tokens that it computes on all devices together, a training step on average; of
    generation new ones."""
    memory: dict[str, Number]
    """Bytes on each device, by part."""
    seconds: dict[str, Number] = field(default_factory=dict)
    """Seconds by part, a training step on average; empty: no machine was named."""

    @property
    def total_bytes(self) -> Number:
        return sum(self.memory.values(), start=0.0)

    @property
    def total_seconds(self) -> Number:
        return sum(self.seconds.values(), start=0.0)

    def to_json(self) -> JsonObject:
        """Returns plain data of one mesh's phase."""
        return {
            "name": self.name,
            "tokens": float(self.tokens),
            "memory": {part: float(size) for part, size in self.memory.items()},
            "memory_total": float(self.total_bytes),
            "seconds": {part: float(time) for part, time in self.seconds.items()},
            "seconds_total": float(self.total_seconds),
        }


@dataclass(frozen=True)
class ExtraPhases:
    """All that a run does beside its training steps."""

    phases: tuple[RunPhase, ...] = ()
    """In the order in which they run."""
    resident_bytes: Number = 0.0
    """Bytes on each device that stay there while the trainer runs."""

    @property
    def total_seconds(self) -> Number:
        """Seconds of a training step's share in them."""
        return sum((phase.total_seconds for phase in self.phases), start=0.0)


def estimate_extra_phases(
    shape: StepShape, machine: Machine | None, planner: GenerationPlanner
) -> ExtraPhases:
    """Estimates what a run does beside its training steps, on one mesh or on each of
    many. On one, raises MaxlmError where the mesh cannot generate; of many, those need
    infinite memory."""
    stored = {name: count_stored_bytes(shape)[name] for name in _STORED}
    phases: list[RunPhase] = []
    resident_bytes: Number = 0.0
    work = planner.work
    if work is not None:
        cost = _plan_generation(shape, planner)
        steps = work.steps_per_rollout
        phases.append(
            RunPhase(
                name=GENERATION,
                tokens=work.num_sequences * work.expected_new_tokens / steps,
                memory=stored | cost.memory,
                seconds={part: time / steps for part, time in cost.seconds.items()},
            )
        )
        if work.keeps_caches:
            resident_bytes = cost.cache_bytes
        for name, model in shape.work.scoring_models.items():
            phase = _estimate_scoring(shape, machine, name, model, work)
            memory = stored | phase.memory | {"caches": resident_bytes}
            phases.append(RunPhase(phase.name, phase.tokens, memory, phase.seconds))
    for extra_pass in shape.work.config.task.extra_passes():
        phase = _estimate_pass(shape, machine, extra_pass)
        memory = stored | phase.memory | {"caches": resident_bytes}
        phases.append(RunPhase(phase.name, phase.tokens, memory, phase.seconds))
    return ExtraPhases(tuple(phases), resident_bytes)


def _plan_generation(shape: StepShape, planner: GenerationPlanner) -> GenerationCost:
    """Plans generation on the mesh, or on each of many."""
    sizes = shape.split.sizes
    if not any(np.ndim(sizes[axis]) for axis in MESH_AXES):
        return planner.plan({axis: int(sizes[axis]) for axis in MESH_AXES})

    # Meshes that differ, and the one that each candidate has.
    columns = np.broadcast_arrays(*(sizes[axis] for axis in MESH_AXES))
    meshes, places = np.unique(np.stack(columns, -1), axis=0, return_inverse=True)
    costs: list[GenerationCost | None] = []
    for mesh in meshes.astype(int).tolist():
        try:
            costs.append(planner.plan(dict(zip(MESH_AXES, mesh, strict=True))))
        except MaxlmError:
            costs.append(None)
    example = next((cost for cost in costs if cost is not None), None)
    if example is None:
        return GenerationCost({"no mesh generates": np.inf}, np.inf, {})

    def collect(numbers: list[Number]) -> Number:
        return np.array(numbers)[places.ravel()]

    def collect_parts(parts: list[dict[str, Number] | None]) -> dict[str, Number]:
        names = next(part for part in parts if part is not None)
        return {
            name: collect([np.inf if part is None else part[name] for part in parts])
            for name in names
        }

    return GenerationCost(
        collect_parts([None if cost is None else cost.memory for cost in costs]),
        collect([np.inf if cost is None else cost.cache_bytes for cost in costs]),
        collect_parts([None if cost is None else cost.seconds for cost in costs]),
    )


def _estimate_scoring(
    shape: StepShape,
    machine: Machine | None,
    name: str,
    model: ScoringWorkload,
    generation: GenerationWork,
) -> RunPhase:
    """Estimates the scores of a rollout: one row after the other, as ``Embedder`` takes
    long ones, padded to a power of two. Other devices wait meanwhile.

    Args:
        name: of the model.
    """
    sizes = model.count_sizes(shape.split.sizes)
    num_tokens = generation.expected_prompt_tokens + generation.expected_new_tokens
    padded_length = 1 << (max(1, round(num_tokens)) - 1).bit_length()
    model_limit = model.work.config.model.max_seq_len
    padded_length = max(num_tokens, min(padded_length, model_limit))
    # Rows of a call are as many as the mesh splits, of which one is a sequence.
    num_rows = generation.num_sequences
    config = model.work.config
    ways = MeshPartitioning(config, sizes).num_devices(config.sharding.compute.batch)
    data = config.data.model_copy(update={"batch_size": num_rows * ways})
    work = copy(model.work)
    work.config = config.model_copy(update={"data": data})
    model_shape = StepShape(
        work,
        sizes,
        micro_batches=num_rows,
        remat="none",
        topology=None if machine is None else machine.topology,
    )
    seconds: dict[str, Number] = {}
    if machine is not None:
        rollout_seconds = estimate_forward_seconds(
            model_shape,
            machine,
            dtype=select_matmul_dtype(machine.chip, work.dtype_bytes),
            makes_logits=False,
        )
        # Of rows as long as the run's.
        length_share = padded_length / work.tokens_per_row.decoder
        step_seconds = length_share * rollout_seconds / generation.steps_per_rollout
        seconds = {"forward passes": step_seconds}
    phase_name = f"scores of {name}"
    if model.is_stand_in:
        phase_name += " (no run there: counted as the policy)"
    return RunPhase(
        name=phase_name,
        tokens=num_rows * num_tokens / generation.steps_per_rollout,
        memory=dict(list_forward_working_set(model_shape, makes_logits=False)),
        seconds=seconds,
    )


def _estimate_pass(
    shape: StepShape, machine: Machine | None, extra_pass: ExtraPass
) -> RunPhase:
    """Estimates a forward pass: its own arrays, and its time."""
    config = shape.work.config
    work = shape.work
    if extra_pass.model is not None:
        others = work.frozen_models | work.auxiliary_models
        other = others[extra_pass.model]
        models = {"model": other.config.model, "adapter": other.config.adapter}
        work = copy(other)
        # It lies as the run's own model does, and reads the run's rows.
        work.config = config.model_copy(update=models)
        work.tokens_per_row = shape.work.tokens_per_row
    pass_shape = StepShape(
        work,
        shape.split.sizes,
        shape.micro_batches,
        remat="none",
        topology=None if machine is None else machine.topology,
    )
    batch_bytes = count_stored_bytes(shape)["batch"] * extra_pass.batches_at_once
    working_set = list_forward_working_set(
        pass_shape, makes_logits=extra_pass.makes_logits
    )
    seconds: dict[str, Number] = {}
    if machine is not None:
        one_pass = estimate_forward_seconds(
            pass_shape,
            machine,
            dtype=select_matmul_dtype(machine.chip, work.dtype_bytes),
            makes_logits=extra_pass.makes_logits,
        )
        seconds = {"forward passes": extra_pass.passes_per_step * one_pass}
    tokens_per_step = config.data.batch_size * shape.work.tokens_per_row.decoder
    return RunPhase(
        name=extra_pass.name,
        tokens=extra_pass.passes_per_step * tokens_per_step,
        memory={"batch": batch_bytes, **working_set},
        seconds=seconds,
    )
