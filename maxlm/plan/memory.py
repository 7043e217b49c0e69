"""Main memory of a training step on each device, part by part.

What rests between steps is exact. What a step adds follows how maxlm's step is written:
a scan keeps its layers' inputs and what the remat policy names, gradients of scanned
layers stay in the compute dtype until all layers are through, and one layer's backward
pass or the loss stands on top. Their working sets are counted in arrays that are alive
together, as XLA's buffer assignments show them (``benchmarks/plan_memory.py``
compares).
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlm.models.costs import AttentionCosts
from maxlm.models.remat import SAVED
from maxlm.plan.stacks import MatmulGroup, Stack
from maxlm.plan.workload import FP32, Number, StepShape

Parts = dict[str, Number]
"""Name of arrays → bytes on each device."""
_BRANCH = "what a branch adds before its last norm, its gradient"
_MEMORY = "gradient of the encoder's output"
# At once: scores of attention (pallas_kernels/attention/xla.py), an expert's hidden
# activations.
_SCORE_BYTES, _HIDDEN_BYTES = 1 << 26, 1 << 30


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device: first what rests between steps, then what is there at the
    peak."""

    parameters: Number
    optimizer: Number
    average: Number
    frozen: Number
    """Other models that the task reads."""
    batch: Number
    gradients: Number
    activations: Number
    """Arrays of the forward pass that the remat policy keeps, layers' inputs
    included."""
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


# Of a layer's residual stream without remat: norms' outputs, and their inputs but for
# the layer's.
_STREAMS = {
    "pre": 3.0,
    "post": 3.0,
    "sandwich": 5.0,
    "parallel": 2.0,
    "parallel_shared": 1.0,
}
PARTS = (
    *("parameters", "optimizer", "average", "frozen", "batch"),
    *("gradients", "activations", "working"),
)


def estimate_memory(shape: StepShape) -> DeviceMemory:
    """Counts the bytes that a training step needs on each device."""
    phases = _list_phases(shape)
    sizes = [
        (*beside, sum(parts.values(), start=0.0)) for *beside, parts in phases.values()
    ]
    totals = np.stack(np.broadcast_arrays(*(sum(phase) for phase in sizes)))
    peak = np.argmax(totals, axis=0)
    at_peak = (
        np.choose(peak, np.broadcast_arrays(*own)) for own in zip(*sizes, strict=True)
    )
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
    """Phase → gradients, kept activations and what is alive besides, beside what
    rests."""
    work, split, stacks = shape.work, shape.split, shape.work.stacks
    added = np.greater(shape.micro_batches, 1) | shape.pipelined
    sums = np.where(
        added, split.local_bytes(split.gradients, work.select_trained(work.specs)), 0.0
    )
    saved = (
        _saved_activations(shape, stack) + _scan_inputs(shape, stack)
        for stack in stacks
    )
    kept = list(accumulate(saved))
    own = [_gradients(shape, stack) for stack in stacks]
    phases = {}
    for i, stack in enumerate(stacks):
        through = np.where(
            added, 0.0, sum(own[i + 1 :], start=0.0)
        )  # or among the sums
        gradients = own[i] + through + sums
        turn = _turn_parameters(shape, stack)
        for phase, parts in list_layer_working_sets(shape, stack).items():
            name = phase if len(stacks) == 1 else f"{phase}, {stack.name}"
            phases[name] = (gradients, kept[i], parts | turn)
    outer = split.local_bytes(
        split.gradients, work.select_trained(work.non_layer_specs)
    )
    phases["the loss"] = (sums, kept[-1], list_loss_working_set(shape))
    phases["the update"] = (
        sum(own) + sums + outer,
        0.0,
        list_update_working_set(shape),
    )
    return phases


def persistent_bytes(shape: StepShape) -> dict[str, Number]:
    """Parameters, optimizer state, their moving average, frozen models, and the
    batch."""
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
    """Counts what a scan whose turns have several layers takes out of their stack at
    once."""
    if not 1 < stack.period < stack.num_layers:
        return {}
    held = shape.split.local_bytes(shape.split.storage, stack.specs.values())
    turns = stack.period / stack.num_layers
    return {
        "parameters of a turn's layers, gradients": (held + _gradients(shape, stack))
        * turns
    }


def _gradients(shape: StepShape, stack: Stack) -> Number:
    """Counts gradients of scanned layers, in the compute dtype, while these are
    differentiated."""
    split, itemsize = shape.split, shape.work.dtype_bytes
    return sum(
        s.size
        * (itemsize if s.role == "matrix" else FP32)
        / split.num_shards(split.gradients, s.axes)
        for s in shape.work.select_trained(stack.specs)
    )


def _scan_inputs(shape: StepShape, stack: Stack) -> Number:
    """Layers' inputs, which the scan keeps under any policy; of a pipeline, stages'
    inputs too; and an encoder's output for layers that look at it."""
    work, stages, micro = shape.work, shape.stages, shape.micro_batches
    one = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    layers = (
        shape.per_stage(stack.num_layers)
        / shape.layer_groups_per_stage
        * stack.token_ratio
    )
    inputs = (
        2 * stages - 1
        if shape.one_f_one_b
        else shape.pipeline_iterations + 3 * micro / stages
    )
    memory = (
        work.tokens_per_row.encoder_tokens_per_decoder_token
        if stack.cross_attention
        else 0.0
    )
    return one * (layers + memory + np.where(shape.pipelined, inputs, 0))


def _saved_activations(shape: StepShape, stack: Stack) -> Number:
    """Counts what the remat policy keeps of the layers that are differentiated
    together."""
    work, split, model = shape.work, shape.split, shape.work.config.model
    itemsize = work.dtype_bytes
    kept = SAVED.get(shape.remat, ())
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
            within += (
                sizes.queries + (sizes.keys + sizes.values) * seen / stack.token_ratio
            )
        if "attention" in kept:
            within += sizes.output + sizes.heads * FP32 / itemsize
    if "mlp_up" in kept:
        within += hidden
    residual = 0.0
    if shape.remat == "none":
        within += sum(
            split.local_ffn_elements_per_token(m) / len(m.kernels) for m in dense
        )
        # Narrow vectors before their norms and after, and heads before theirs.
        within += 2 * sum(m.latent_width for m in stack.matmul_groups)
        sizes = split.local_attention_widths(own)
        within += sizes.queries + sizes.keys if own and own.qk_norm else 0.0
        if own is None:
            mixer = (m for m in stack.matmul_groups if m.branch == "mixer")
            within += sum(map(split.local_non_residual_width, mixer))
        residual = model.d_model * (
            _STREAMS[model.placement] + 2 * stack.cross_attention
        )
    layers = shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage
    elements = shape.micro_batch_tokens * within + shape.residual_tokens * residual
    tokens = stack.token_ratio * elements
    experts = 0.0
    if stack.experts and shape.remat == "none":
        experts = shape.expert_buffer_rows * (model.d_model * itemsize + FP32)
    return layers * (tokens * itemsize + experts)


def list_layer_working_sets(shape: StepShape, stack: Stack) -> dict[str, Parts]:
    """Phase → what is alive besides while a layer of a stack is differentiated, by
    branch."""
    sets = {}
    if heads := stack.heads():
        biased = shape.work.config.model.positions.kind == "relative"
        sets["a layer's attention"] = _attention(
            shape, stack, heads, stack.token_ratio, biased
        )
    else:
        sets["a layer's mixer"] = _mixer(shape, stack)
    if heads := stack.heads("cross_attention"):
        seen = shape.work.tokens_per_row.encoder_tokens_per_decoder_token
        sets["a layer's cross-attention"] = _attention(shape, stack, heads, seen, False)
    for group in stack.matmul_groups:
        if group.is_dense_ffn:
            sets[f"a layer's {group.module}"] = _mlp(shape, stack, group)
    if stack.experts:
        sets["a layer's experts"] = _experts(shape, stack)
    if shape.work.config.model.placement == "sandwich":
        # Norms are in fp32.
        branch = 2 * _stream(shape, stack) / shape.work.dtype_bytes * FP32
        sets = {phase: parts | {_BRANCH: branch} for phase, parts in sets.items()}
    if stack.cross_attention:
        encoder_rate = shape.work.tokens_per_row.encoder_tokens_per_decoder_token
        whole = _stream(shape, stack) / stack.token_ratio * encoder_rate
        sets = {phase: parts | {_MEMORY: whole} for phase, parts in sets.items()}
    kernels = [k for group in stack.matmul_groups for k in group.kernels]
    if shape.unordered_frozen_layers and not any(k.is_trained for k in kernels):
        return {"a layer": _frozen_layer(shape, stack, sets)}
    return sets


def _frozen_layer(shape: StepShape, stack: Stack, branches: dict[str, Parts]) -> Parts:
    """All branches together. XLA:GPU copies kernels into the stream that rest in the
    compute dtype, of all layers at once, into another layout; others are cast layer by
    layer."""
    parts = {
        f"{phase}: {p}": size
        for phase, own in branches.items()
        for p, size in own.items()
    }
    mixer = (group for group in stack.matmul_groups if group.branch != "ffn")
    copied = [
        spec
        for spec in stack.base_specs.values()
        if spec.role == "matrix" and spec.axes[-1] == "embed"
        if jnp.dtype(spec.dtype).itemsize == shape.work.dtype_bytes
    ]
    return parts | {
        "other kernels, gathered": sum(
            map(shape.gathered_weight_bytes, mixer), start=0.0
        ),
        "kernels into the stream, copied": shape.split.local_bytes(
            shape.split.storage, copied
        ),
    }


def _stream(shape: StepShape, stack: Stack) -> Number:
    """One array of the residual stream's width."""
    width = shape.work.config.model.d_model * shape.work.dtype_bytes
    return shape.residual_tokens * stack.token_ratio * width


def _mlp(shape: StepShape, stack: Stack, group: MatmulGroup) -> Parts:
    """Its maps' outputs and their cotangents, their kernels, the stream and its
    gradient, norms' inputs and outputs."""
    work, itemsize = shape.work, shape.work.dtype_bytes
    beside = (m for m in stack.matmul_groups if m.module == group.module)
    count = len(group.kernels)
    tokens = shape.micro_batch_tokens * stack.token_ratio
    one = tokens * shape.split.local_ffn_elements_per_token(group) / count * itemsize
    kept = 1 if "mlp_up" in SAVED.get(shape.remat, ()) else count + 1
    outputs = 0 if shape.remat == "none" else kept
    stream = _stream(shape, stack)
    inner = tokens * work.config.model.d_model * itemsize
    # Where the sequence is gathered, the stream's width is there five times in both
    # lengths.
    width = np.where(np.greater(inner, stream), 5 * inner + 4 * stream, 5 * stream)
    return {
        "kernels, gathered": sum(map(shape.gathered_weight_bytes, beside), start=0.0),
        "hidden activations and their gradients": one * (outputs + count),
        "residual stream, norms, their gradients": width,
    }


def _mixer(shape: StepShape, stack: Stack) -> Parts:
    """A mixer without heads: its matrices' products, their fp32 states and
    gradients."""
    maps = [m for m in stack.matmul_groups if m.branch == "mixer"]
    tokens = shape.micro_batch_tokens * stack.token_ratio
    inner = tokens * sum(shape.split.local_non_residual_width(m) for m in maps)
    return {
        "kernels, gathered": sum(map(shape.gathered_weight_bytes, maps), start=0.0),
        "its products and their gradients": 2 * inner * (shape.work.dtype_bytes + FP32),
        "residual stream, norms, their gradients": 5 * _stream(shape, stack),
    }


def _attention(
    shape: StepShape, stack: Stack, heads: AttentionCosts, seen: float, biased: bool
) -> Parts:
    """Attention that looks at ``seen`` tokens for each of the batch, with learnt biases
    or not."""
    split, work = shape.split, shape.work
    sizes = split.local_attention_widths(heads)
    itemsize = work.dtype_bytes
    tokens = shape.micro_batch_tokens * stack.token_ratio
    length, keys = (
        work.tokens_per_row.decoder * rate for rate in (stack.token_ratio, seen)
    )
    # A tile of queries with all keys.
    scores = (
        shape.micro_batch_size
        * sizes.heads
        * min(max(128, length / 16), length)
        * keys
        * FP32
    )
    scores = (
        0.0
        if shape.fused_attention and not biased
        else 3 * np.minimum(scores, _SCORE_BYTES)
    )
    whole = shape.micro_batch_tokens * seen * split.num_devices(split.compute.seq)
    narrow = sum(group.latent_width for group in stack.matmul_groups)
    parts = {
        "queries, output and their gradients": tokens
        * (sizes.queries * (itemsize + FP32) + sizes.output * 2 * itemsize),
        "keys, values and their gradients": whole
        * (sizes.keys + sizes.values)
        * (itemsize + FP32),
        "scores of a tile": scores,
        "residual stream, norms, their gradients": 4 * _stream(shape, stack),
    }
    if narrow:
        # The vectors before norms and after, and their gradients; parts of heads, not
        # yet joined.
        joined = sizes.queries + sizes.keys
        parts["latent vectors, parts of heads"] = (
            tokens * itemsize * (4 * narrow + joined)
        )
    return parts


def _experts(shape: StepShape, stack: Stack) -> Parts:
    work, rows, itemsize = shape.work, shape.expert_buffer_rows, shape.work.dtype_bytes
    width = work.config.model.d_model
    maps = [m for m in stack.matmul_groups if m.has_experts]
    weights = sum(map(shape.gathered_weight_bytes, maps))
    largest = max(k.size for m in maps for k in m.kernels) / sum(m.size for m in maps)
    inner = next(m for m in maps if m.output_features == "mlp")
    hidden = (
        rows
        * shape.split.local_ffn_elements_per_token(inner)
        / len(inner.kernels)
        * itemsize
    )
    return {
        "kernels, gathered, and one's gradient": (1 + largest) * weights,
        "rows received and their gradients": rows * width * (2 * itemsize + FP32),
        "hidden activations and their gradients": 3 * np.minimum(hidden, _HIDDEN_BYTES),
        "residual stream, norms, their gradients": 4 * _stream(shape, stack),
    }


def list_loss_working_set(shape: StepShape) -> Parts:
    work, split = shape.work, shape.split
    model, itemsize = work.config.model, work.dtype_bytes
    size = work.head.size / split.num_shards(split.compute, work.head.axes)
    tokens = shape.embedding_loss_tokens
    states = 5 + 3 * len(work.non_layer_kernels)
    chunk = np.minimum(work.config.task.chunk_tokens, tokens)
    logits = chunk * model.vocab_size / split.num_devices(split.compute.vocab)
    return {
        "head, gathered": shape.gathered_weight_bytes(work.head),
        "its gradient": size * FP32 if work.head.is_trained else 0.0,
        "logits of a chunk": logits * (FP32 + itemsize),
        "hidden states and their gradients": states * tokens * model.d_model * itemsize,
    }


def list_update_working_set(shape: StepShape) -> Parts:
    """Lists the updates gathered, where each device updates a part of what it holds
    (ZeRO-1 and 2): the two largest parameters' are alive together."""
    work = shape.work
    split = shape.split
    whole = []
    for spec in work.select_trained(work.specs):
        held = split.local_bytes(split.storage, [spec])
        whole.append(
            np.where(split.local_bytes(split.optimizer, [spec]) < held, held, 0.0)
        )
    largest = np.sort(np.stack(np.broadcast_arrays(*whole)), axis=0)[-2:]
    return {"updates, gathered": largest.sum(axis=0)}
