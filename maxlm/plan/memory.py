"""Main memory of a training step on each device, part by part.

What rests between steps is exact. What a step adds follows how maxlm's step is written: a scan
keeps its layers' inputs and what the remat policy names, gradients of scanned layers stay in the
compute dtype until all layers are through, and one layer's backward pass or the loss stands on top.
Their working sets are counted in arrays that are alive together, as XLA's buffer assignments show
them (``benchmarks/plan_memory.py`` compares).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.models.remat import SAVED
from maxlm.plan.communication.collective import FP32
from maxlm.plan.shape import Shape, received_rows
from maxlm.plan.working import LOSS, UPDATE, Parts, hidden_elements, working_sets
from maxlm.plan.workload import Number, Split
from maxlm.sharding import AxisRules


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: Number
    optimizer: Number
    average: Number
    batch: Number
    gradients: Number
    """At the peak, like what follows."""
    activations: Number
    """What the remat policy keeps of the forward pass, layers' inputs included."""
    working: Number
    """What is alive besides."""
    peak: Number
    """When that is: an index into ``working_sets``."""
    working_sets: dict[str, Parts]
    """What is alive besides in each phase of a step, by part."""

    @property
    def total(self) -> Number:
        return sum((getattr(self, part) for part in PARTS), start=0.0)

    @property
    def allocated(self) -> Number:
        """What a step takes and gives back."""
        return self.gradients + self.activations + self.working

    @property
    def phase(self) -> str:
        """Of one plan: when the peak is."""
        return list(self.working_sets)[int(self.peak)]

    def to_json(self) -> dict[str, Any]:
        """Of one plan, as plain data."""
        sets = {
            phase: {part: float(size) for part, size in parts.items()}
            for phase, parts in self.working_sets.items()
        }
        parts = {part: float(getattr(self, part)) for part in PARTS}
        return {**parts, "total": float(self.total), "peak_at": self.phase, "working_sets": sets}


PARTS = ("parameters", "optimizer", "average", "batch", "gradients", "activations", "working")


def memory(shape: Shape) -> Memory:
    """What a training step needs."""
    layers, sums = _gradients(shape)
    activations = _kept(shape) + _carried(shape)
    ends = [(s.nbytes, s.axes) for s in shape.work.outer_specs.values()]
    outer = _spread(shape.split, shape.split.gradients, ends)
    # Beside what rests: gradients and kept activations in each phase.
    beside = {
        LOSS: (sums, activations),
        UPDATE: (layers + sums + outer, 0.0),
    }
    sets = working_sets(shape)
    phases = [
        (*beside.get(phase, (layers + sums, activations)), sum(parts.values(), start=0.0))
        for phase, parts in sets.items()
    ]
    totals = np.stack(np.broadcast_arrays(*(sum(phase) for phase in phases)))
    peak = np.argmax(totals, axis=0)
    gradients, activations, working = (
        np.choose(peak, np.broadcast_arrays(*parts)) for parts in zip(*phases, strict=True)
    )
    return Memory(
        **resting(shape),
        gradients=gradients,
        activations=activations,
        working=working,
        peak=peak,
        working_sets=sets,
    )


def resting(shape: Shape) -> dict[str, Number]:
    """Parameters, optimizer state, their moving average, and the batch."""
    work, split = shape.work, shape.split
    config = work.config
    parameters = _spread(split, split.storage, [(s.nbytes, s.axes) for s in work.specs.values()])
    state = [(np.prod(a.shape) * a.dtype.itemsize, a.axes) for a in work.optimizer]
    # Tokens, targets, segments, positions and weights, 4 bytes each.
    tokens = config.data.batch_size * config.data.seq_len
    spread = split.ways((*split.compute.batch, *split.compute.seq))
    return {
        "parameters": parameters,
        "optimizer": _spread(split, split.optimizer, state),
        "average": parameters if config.train.ema_decay is not None else 0.0,
        "batch": 5 * 4 * tokens / spread,
    }


def _spread(split: Split, rules: AxisRules, arrays: list[tuple[Any, Any]]) -> Number:
    return sum((nbytes / split.shards(rules, axes) for nbytes, axes in arrays), start=0.0)


def _gradients(shape: Shape) -> tuple[Number, Number]:
    """Of scanned layers, in the compute dtype, while these are being differentiated; and fp32 sums
    over micro-batches."""
    work, split = shape.work, shape.split
    layers = _spread(
        split,
        split.gradients,
        [
            (s.size * (work.dtype_bytes if s.role == "matrix" else FP32), s.axes)
            for s in work.layer_specs.values()
        ],
    )
    sums = _spread(split, split.gradients, [(s.nbytes, s.axes) for s in work.specs.values()])
    added = np.greater(shape.micro, 1) | shape.pipelined
    return layers, np.where(added, sums, 0.0)


def _carried(shape: Shape) -> Number:
    """Layers' inputs, which the scan keeps under any policy; of a pipeline, stages' inputs too."""
    work, stages, micro = shape.work, shape.stages, shape.micro
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    layers = shape.stage_layers / shape.groups
    if work.config.parallel.schedule == "1f1b":
        inputs = 2 * stages - 1
    else:
        inputs = shape.ticks + 3 * micro / stages
    return one * (layers + np.where(shape.pipelined, inputs, 0))


def _kept(shape: Shape) -> Number:
    """What the remat policy keeps of the layers that are differentiated together."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    model, itemsize = work.config.model, work.dtype_bytes
    attention, heads = model.attention, split.ways(rules.heads)
    queries = attention.num_heads * attention.head_dim / heads
    keys = attention.num_kv_heads * attention.head_dim / split.ways(rules.kv_heads)
    lse = attention.num_heads / heads * FP32 / itemsize
    hidden = sum(hidden_elements(m, split) for m in work.maps if not m.experts)
    kept = SAVED.get(shape.remat, ())
    within = 0.0
    if "qkv" in kept:
        within += queries + 2 * keys
    if "attention" in kept:
        within += queries + lse
    if "mlp_up" in kept:
        within += hidden
    residual = 0.0
    if shape.remat == "none":
        gated = [m for m in work.maps if m.writes == "mlp" and not m.experts]
        products = sum(hidden_elements(m, split) / len(m.kernels) for m in gated)
        within = 2 * queries + lse + 2 * keys + hidden + products
        residual = 3.0 * model.d_model  # both norms' outputs, and the stream between the branches
    layers = shape.stage_layers / shape.groups
    tokens = shape.tokens * within + shape.residual_tokens * residual
    return layers * (tokens * itemsize + _kept_of_experts(shape))


def _kept_of_experts(shape: Shape) -> Number:
    if shape.work.config.model.moe is None or shape.remat != "none":
        return 0.0
    return received_rows(shape) * (shape.work.config.model.d_model * shape.work.dtype_bytes + FP32)
