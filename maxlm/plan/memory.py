"""Main memory of a training step on each device, part by part.

What rests between steps is exact. What a step adds follows how maxlm's step is written: a scan
keeps its layers' inputs and what the remat policy names, gradients of scanned layers stay in the
compute dtype until all layers are through, and one layer's backward pass or the loss stands on top.
Their working sets are counted in arrays that are alive together, as XLA's buffer assignments show
them (``benchmarks/plan_memory.py`` compares).
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from maxlm.models.remat import SAVED
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import Stack
from maxlm.plan.working import (
    Parts,
    list_layer_working_sets,
    list_loss_working_set,
    list_update_working_set,
)
from maxlm.plan.workload import FP32, Number


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device: first what rests between steps, then what is there at the peak."""

    parameters: Number
    optimizer: Number
    average: Number
    frozen: Number
    """Other models that the task reads."""
    batch: Number
    gradients: Number
    activations: Number
    """Arrays of the forward pass that the remat policy keeps, layers' inputs included."""
    working: Number
    """Other arrays that are alive at the peak."""
    peak_index: Number
    """The peak's index in ``working_sets``."""
    working_sets: dict[str, Parts]
    """Other arrays that are alive in each phase of a step, by part."""

    @property
    def total(self) -> Number:
        return sum((getattr(self, part) for part in PARTS), start=0.0)

    @property
    def transient_bytes(self) -> Number:
        """Bytes that a step takes and gives back."""
        return self.gradients + self.activations + self.working

    @property
    def peak_phase(self) -> str:
        """The phase in which one plan's peak is."""
        return list(self.working_sets)[int(self.peak_index)]

    def to_json(self) -> dict[str, Any]:
        return {
            **{part: float(getattr(self, part)) for part in (*PARTS, "total")},
            "peak_at": self.peak_phase,
            "working_sets": {
                phase: {part: float(size) for part, size in parts.items()}
                for phase, parts in self.working_sets.items()
            },
        }


# Of a layer's residual stream without remat: norms' outputs, and their inputs but for the layer's.
_STREAMS = {"pre": 3.0, "post": 3.0, "sandwich": 5.0, "parallel": 2.0, "parallel_shared": 1.0}
PARTS = (
    *("parameters", "optimizer", "average", "frozen", "batch"),
    *("gradients", "activations", "working"),
)


def estimate_memory(shape: StepShape) -> DeviceMemory:
    """Counts the bytes that a training step needs on each device."""
    phases = _list_phases(shape)
    sizes = [(*beside, sum(parts.values(), start=0.0)) for *beside, parts in phases.values()]
    totals = np.stack(np.broadcast_arrays(*(sum(phase) for phase in sizes)))
    peak = np.argmax(totals, axis=0)
    at_peak = (np.choose(peak, np.broadcast_arrays(*own)) for own in zip(*sizes, strict=True))
    gradients, activations, working = at_peak
    return DeviceMemory(
        **persistent_bytes(shape),
        gradients=gradients,
        activations=activations,
        working=working,
        peak_index=peak,
        working_sets={phase: parts for phase, (*_, parts) in phases.items()},
    )


def _list_phases(shape: StepShape) -> dict[str, tuple[Number, Number, Parts]]:
    """Phase → gradients, kept activations and what is alive besides, beside what rests."""
    work, split, stacks = shape.work, shape.split, shape.work.stacks
    added = np.greater(shape.micro_batches, 1) | shape.pipelined
    held = split.local_bytes(split.gradients, work.select_trained(work.specs))
    sums = np.where(added, held, 0.0)
    saved = (_saved_activations(shape, stack) + _scan_inputs(shape, stack) for stack in stacks)
    kept = list(accumulate(saved))
    own = [_gradients(shape, stack) for stack in stacks]
    phases = {}
    for i, stack in enumerate(stacks):
        through = np.where(added, 0.0, sum(own[i + 1 :], start=0.0))  # or among the sums
        gradients = own[i] + through + sums
        turn = _turn_parameters(shape, stack)
        for phase, parts in list_layer_working_sets(shape, stack).items():
            name = phase if len(stacks) == 1 else f"{phase}, {stack.name}"
            phases[name] = (gradients, kept[i], parts | turn)
    outer = split.local_bytes(split.gradients, work.select_trained(work.non_layer_specs))
    phases["the loss"] = (sums, kept[-1], list_loss_working_set(shape))
    phases["the update"] = (sum(own) + sums + outer, 0.0, list_update_working_set(shape))
    return phases


def persistent_bytes(shape: StepShape) -> dict[str, Number]:
    """Parameters, optimizer state, their moving average, frozen models, and the batch."""
    work, split, config = shape.work, shape.split, shape.work.config
    parameters = split.local_bytes(split.storage, work.specs.values())
    arrays = config.task.batch_arrays(config.data.seq_len).values()
    tokens = (*split.compute.batch, *split.compute.seq)
    row = sum(np.prod(each.shape) * np.dtype(each.dtype).itemsize for each in arrays)
    return {
        "parameters": parameters,
        "optimizer": split.local_bytes(split.optimizer, work.optimizer),
        "average": parameters if config.train.ema_decay is not None else 0.0,
        "frozen": split.local_bytes(split.storage, work.frozen_specs),
        "batch": config.data.batch_size * row / split.num_devices(tokens),
    }


def _turn_parameters(shape: StepShape, stack: Stack) -> Parts:
    """Counts what a scan whose turns have several layers takes out of their stack at once."""
    if not 1 < stack.period < stack.num_layers:
        return {}
    held = shape.split.local_bytes(shape.split.storage, stack.specs.values())
    turns = stack.period / stack.num_layers
    return {"parameters of a turn's layers, gradients": (held + _gradients(shape, stack)) * turns}


def _gradients(shape: StepShape, stack: Stack) -> Number:
    """Counts gradients of scanned layers, in the compute dtype, while these are differentiated."""
    split, itemsize = shape.split, shape.work.dtype_bytes
    return sum(
        s.size
        * (itemsize if s.role == "matrix" else FP32)
        / split.num_shards(split.gradients, s.axes)
        for s in shape.work.select_trained(stack.specs)
    )


def _scan_inputs(shape: StepShape, stack: Stack) -> Number:
    """Layers' inputs, which the scan keeps under any policy; of a pipeline, stages' inputs too;
    and an encoder's output for layers that look at it."""
    work, stages, micro = shape.work, shape.stages, shape.micro_batches
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    layers = shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage * stack.token_ratio
    inputs = 2 * stages - 1 if shape.one_f_one_b else shape.pipeline_iterations + 3 * micro / stages
    memory = work.tokens_per_row.encoder_tokens_per_decoder_token if stack.cross_attention else 0.0
    return one * (layers + memory + np.where(shape.pipelined, inputs, 0))


def _saved_activations(shape: StepShape, stack: Stack) -> Number:
    """Counts what the remat policy keeps of the layers that are differentiated together."""
    work, split, model = shape.work, shape.split, shape.work.config.model
    itemsize, kept = work.dtype_bytes, SAVED.get(shape.remat, ())
    if shape.remat == "none":
        kept = ("qkv", "attention", "mlp_up")
    own, crossing = stack.heads(), stack.heads("cross_attention")
    encoder_rate = work.tokens_per_row.encoder_tokens_per_decoder_token
    dense = [m for m in stack.matmul_groups if m.is_dense_ffn]
    hidden = sum(split.local_ffn_elements_per_token(m) for m in dense)
    within = 0.0
    for heads, seen in ((own, stack.token_ratio), (crossing, encoder_rate)):
        sizes = split.local_attention_widths(heads)
        if "qkv" in kept:
            within += sizes.queries + (sizes.keys + sizes.values) * seen / stack.token_ratio
        if "attention" in kept:
            within += sizes.output + sizes.heads * FP32 / itemsize
    if "mlp_up" in kept:
        within += hidden
    residual = 0.0
    if shape.remat == "none":
        within += sum(split.local_ffn_elements_per_token(m) / len(m.kernels) for m in dense)
        # Narrow vectors before their norms and after, and heads before theirs.
        within += 2 * sum(m.latent_width for m in stack.matmul_groups)
        sizes = split.local_attention_widths(own)
        within += sizes.queries + sizes.keys if own and own.qk_norm else 0.0
        if own is None:
            mixer = (m for m in stack.matmul_groups if m.branch == "mixer")
            within += sum(map(split.local_non_residual_width, mixer))
        residual = model.d_model * (_STREAMS[model.placement] + 2 * stack.cross_attention)
    layers = shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage
    elements = shape.micro_batch_tokens * within + shape.residual_tokens * residual
    tokens = stack.token_ratio * elements
    experts = 0.0
    if stack.experts and shape.remat == "none":
        experts = shape.expert_buffer_rows * (model.d_model * itemsize + FP32)
    return layers * (tokens * itemsize + experts)
