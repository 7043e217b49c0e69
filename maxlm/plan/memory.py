"""Main memory of a training step on each device, part by part.

What rests between steps is exact. What a step adds follows how maxlm's step is written: a scan
keeps its layers' inputs and what the remat policy names, gradients of scanned layers stay in the
compute dtype until all layers are through, and one layer's backward pass or the loss stands on top.
Their working sets are counted in arrays that are alive together, as XLA's buffer assignments show
them (``benchmarks/plan_memory.py`` compares).
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from maxlm.models.remat import SAVED
from maxlm.plan.communication.collective import FP32
from maxlm.plan.shape import Shape, received_rows
from maxlm.plan.workload import Map, Number, Split
from maxlm.sharding import AxisRules

# Scores of attention at once (pallas_kernels/attention.py) and of an expert's hidden activations.
_SCORE_BYTES, _HIDDEN_BYTES = 1 << 26, 1 << 30


PHASES = ("one layer's backward pass", "the loss", "the update")


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
    """When that is: an index into ``PHASES``; no part of the total."""

    @property
    def total(self) -> Number:
        parts = (getattr(self, f.name) for f in fields(self) if f.name != "peak")
        return sum(parts, start=0.0)

    @property
    def phase(self) -> str:
        """Of one plan: when the peak is."""
        return PHASES[int(self.peak)]


def memory(shape: Shape) -> Memory:
    """What a training step needs."""
    layers, sums = _gradients(shape)
    activations = _kept(shape) + _carried(shape)
    ends, gathered = _update(shape)
    # What is alive in each phase beside what rests: (gradients, activations, working set).
    phases = (
        (layers + sums, activations, _layer(shape)),
        (sums, activations, _loss(shape)),
        (layers + sums + ends, 0.0, gathered),
    )
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


def _update(shape: Shape) -> tuple[Number, Number]:
    """Gradients of what is not scanned; and, where each device updates a part of what it holds
    (ZeRO-1 and 2), the updates of the two largest parameters, gathered."""
    work, split = shape.work, shape.split
    ends = [(s.nbytes, s.axes) for s in work.outer_specs.values()]
    if split.optimizer == split.storage:
        return _spread(split, split.gradients, ends), 0.0
    whole = [s.nbytes / split.shards(split.storage, s.axes) for s in work.specs.values()]
    largest = np.sort(np.stack(np.broadcast_arrays(*whole)), axis=0)[-2:]
    return _spread(split, split.gradients, ends), largest.sum(axis=0)


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
    hidden = sum(_writes_hidden(m, split) for m in work.maps if not m.experts)
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
        products = sum(_writes_hidden(m, split) / len(m.kernels) for m in gated)
        within = 2 * queries + lse + 2 * keys + hidden + products
        residual = 3.0 * model.d_model  # both norms' outputs, and the stream between the branches
    layers = shape.stage_layers / shape.groups
    tokens = shape.tokens * within + shape.residual_tokens * residual
    return layers * (tokens * itemsize + _kept_of_experts(shape))


def _kept_of_experts(shape: Shape) -> Number:
    if shape.work.config.model.moe is None or shape.remat != "none":
        return 0.0
    return received_rows(shape) * (shape.work.config.model.d_model * shape.work.dtype_bytes + FP32)


def _writes_hidden(map_: Map, split: Split) -> Number:
    """Elements a token of what a map writes into the FFN's width on one device."""
    if map_.writes != "mlp":
        return 0.0
    return sum(k.shape[-1] / split.shards(split.compute, k.axes[-1:]) for k in map_.kernels)


def _weights_of(map_: Map, shape: Shape) -> Number:
    """Bytes of a map's kernels in use."""
    split = shape.split
    return sum(
        k.size * shape.work.dtype_bytes / split.shards(split.compute, k.axes) for k in map_.kernels
    )


def _layer(shape: Shape) -> Number:
    """One layer's backward pass, at its widest: the feed-forward's, attention's, or the experts'.

    Of the feed-forward: its maps' outputs and their cotangents, their kernels and one's gradient
    before it is scattered, the residual stream and its gradient, norms' inputs and outputs.
    """
    work, itemsize = shape.work, shape.work.dtype_bytes
    model = work.config.model
    stream = shape.residual_tokens * model.d_model * itemsize
    inner = shape.tokens * model.d_model * itemsize
    widest = 0.0
    for map_ in work.maps:
        if map_.writes != "mlp" or map_.experts:
            continue
        back = next(m for m in work.maps if m.reads == "mlp" and _module(m) == _module(map_))
        one = shape.tokens * _writes_hidden(map_, shape.split) / len(map_.kernels) * itemsize
        count = len(map_.kernels)
        outputs = count + 1 if shape.remat == "none" or "mlp_up" not in SAVED[shape.remat] else 1
        if shape.remat == "none":
            outputs = 0
        weights = _weights_of(map_, shape) + _weights_of(back, shape)
        # Where the sequence is gathered, the stream's width is there five times in both lengths.
        width = np.where(np.greater(inner, stream), 5 * inner + 4 * stream, 5 * stream)
        widest = np.maximum(widest, one * (outputs + count) + weights + width)
    widest = np.maximum(widest, _attention(shape, stream))
    if model.moe is not None:
        widest = np.maximum(widest, _experts(shape, stream))
    return widest


def _module(map_: Map) -> str:
    return map_.name.partition(":")[0]


def _attention(shape: Shape, stream: Number) -> Number:
    split, rules = shape.split, shape.split.compute
    attention, itemsize = shape.work.config.model.attention, shape.work.dtype_bytes
    heads = attention.num_heads / split.ways(rules.heads)
    keys = attention.num_kv_heads / split.ways(rules.kv_heads)
    one = shape.tokens * attention.head_dim
    queries = one * heads
    seq_len = shape.work.config.data.seq_len
    # A tile of queries with all keys (pallas_kernels/attention.py).
    scores = shape.rows * heads * min(max(128, seq_len / 16), seq_len) * seq_len * FP32
    scores = np.minimum(scores, _SCORE_BYTES)
    wide = 3 * queries * itemsize + queries * FP32
    return (
        wide
        + one * keys * split.ways(rules.seq) * (2 * itemsize + 2 * FP32)
        + 3 * scores
        + 4 * stream
    )


def _experts(shape: Shape, stream: Number) -> Number:
    work, moe = shape.work, shape.work.config.model.moe
    assert moe is not None
    rows, itemsize = received_rows(shape), work.dtype_bytes
    width = work.config.model.d_model
    weights = sum(_weights_of(m, shape) for m in work.maps if m.experts)
    hidden = np.minimum(
        rows * moe.d_ff / shape.split.ways(shape.split.compute.mlp) * itemsize, _HIDDEN_BYTES
    )
    kernel = max(k.size for m in work.maps if m.experts for k in m.kernels) / (
        sum(k.size for m in work.maps if m.experts for k in m.kernels)
    )
    return (1 + kernel) * weights + rows * width * (2 * itemsize + FP32) + 3 * hidden + 4 * stream


def _loss(shape: Shape) -> Number:
    """The head and its fp32 gradient, one chunk's logits, and hidden states with theirs."""
    work, split = shape.work, shape.split
    model, itemsize = work.config.model, work.dtype_bytes
    size = work.head.size / split.shards(split.compute, ("embed", "vocab"))
    stages = np.where(shape.pipelined & (work.config.parallel.schedule != "1f1b"), shape.stages, 1)
    tokens = shape.tokens * np.where(stages > 1, shape.micro / stages, 1)
    chunk = np.minimum(work.config.objective.chunk_tokens, tokens)
    logits = chunk * model.vocab_size / split.ways(split.compute.vocab)
    hidden = tokens * model.d_model * itemsize
    return size * (itemsize + FP32) + logits * (FP32 + itemsize) + 5 * hidden
