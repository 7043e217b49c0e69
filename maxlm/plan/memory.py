"""Main memory of a training step on each device, part by part.

What is stored between steps is exact. What a step adds follows how maxlm's step is
written: a scan keeps its layers' inputs and what the remat policy names, gradients of
scanned layers stay in the compute dtype until all layers are through, and one layer's
backward pass or the loss stands on top. Their working sets are counted in arrays that
are alive together, as XLA's buffer assignments show them (``benchmarks/plan_memory.py``
compares).

A plan holds one number for each figure, a search an array of them (``Number``): so no
formula here may branch on a mesh's sizes, only on the model's config.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlm.models.costs import AttentionCosts
from maxlm.models.params import ParamSpec
from maxlm.models.remat import SAVED
from maxlm.parallel.experts import HIDDEN_BYTES
from maxlm.plan.stacks import MatmulGroup, StackCosts
from maxlm.plan.workload import FP32, Number, StepShape

# Bytes of a tile's scores at once (SCORE_BYTES of pallas_kernels/attention/xla.py, which
# the plan does not import).
_SCORE_BYTES = 1 << 26
WorkingSet = dict[str, Number]
"""Name of arrays that are alive together → bytes on each device."""
# Keys of working sets that several layers share.
_BRANCH_OUTPUT = "what a branch adds before its last norm, its gradient"
_ENCODER_OUTPUT = "gradient of the encoder's output"
_KERNELS = "kernels, gathered"
_STREAM_AND_NORMS = "residual stream, norms, their gradients"
_HIDDEN = "hidden activations and their gradients"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device: first what is stored between steps, then what there is at
    the peak."""

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
    working_sets: dict[str, WorkingSet]
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
        parts = {part: float(getattr(self, part)) for part in (*PARTS, "total")}
        working_sets = {
            phase: {name: float(size) for name, size in arrays.items()}
            for phase, arrays in self.working_sets.items()
        }
        return {**parts, "peak_at": self.peak_phase, "working_sets": working_sets}


PARTS = (
    "parameters",
    "optimizer",
    "average",
    "frozen",
    "batch",
    "gradients",
    "activations",
    "working",
)
"""Fields of :class:`DeviceMemory` that add up to its total."""
# Arrays of the residual stream's width that a layer without remat keeps: its norms'
# outputs, and their inputs but for the layer's, by where the norms stand.
_KEPT_STREAM_ARRAYS = {
    "pre": 3.0,
    "post": 3.0,
    "sandwich": 5.0,
    "parallel": 2.0,
    "parallel_shared": 1.0,
}


@dataclass(frozen=True)
class _Phase:
    """The arrays alive in one phase of a step, beside those stored between steps."""

    gradients: Number
    activations: Number
    """Kept activations of layers whose backward pass has not run yet."""
    working_set: WorkingSet

    @property
    def working_bytes(self) -> Number:
        return sum(self.working_set.values(), start=0.0)

    @property
    def total(self) -> Number:
        return self.gradients + self.activations + self.working_bytes


def estimate_memory(shape: StepShape) -> DeviceMemory:
    """Estimates the bytes that a training step needs on each device."""
    phases = _list_phases(shape)
    totals = [phase.total for phase in phases.values()]
    peak_index = np.argmax(np.stack(np.broadcast_arrays(*totals)), axis=0)

    def take_at_peak(sizes: list[Number]) -> Number:
        """Takes each candidate's size in the phase in which its own peak is."""
        return np.choose(peak_index, np.broadcast_arrays(*sizes))

    return DeviceMemory(
        **count_stored_bytes(shape),
        gradients=take_at_peak([phase.gradients for phase in phases.values()]),
        activations=take_at_peak([phase.activations for phase in phases.values()]),
        working=take_at_peak([phase.working_bytes for phase in phases.values()]),
        peak_index=peak_index,
        working_sets={name: phase.working_set for name, phase in phases.items()},
    )


def _list_phases(shape: StepShape) -> dict[str, _Phase]:
    """Lists the phases of a step that can be its peak, by name."""
    work = shape.work
    split = shape.split
    stacks = work.stacks

    # Over several micro-batches, and in a pipeline, all gradients are summed up in
    # arrays that live from the first micro-batch to the update.
    sums_gradients = np.greater(shape.micro_batches, 1) | shape.pipelined
    trained_bytes = split.local_bytes(split.gradients, work.select_trained(work.specs))
    gradient_sums = np.where(sums_gradients, trained_bytes, 0.0)

    # While a stack is differentiated, the stacks before it still wait with what their
    # forward passes have kept.
    kept_by_stack = [
        _count_saved_bytes(shape, stack) + _count_scan_inputs(shape, stack)
        for stack in stacks
    ]
    kept_so_far = list(accumulate(kept_by_stack))
    stack_gradients = [_count_stack_gradients(shape, stack) for stack in stacks]

    phases: dict[str, _Phase] = {}
    for i, stack in enumerate(stacks):
        # Gradients of later stacks are complete; or they are among the sums already.
        later = sum(stack_gradients[i + 1 :], start=0.0)
        later = np.where(sums_gradients, 0.0, later)
        gradients = stack_gradients[i] + later + gradient_sums
        sliced = _list_sliced_layers(shape, stack)
        for name, arrays in list_layer_working_sets(shape, stack).items():
            if len(stacks) > 1:
                name = f"{name}, {stack.name}"
            phases[name] = _Phase(gradients, kept_so_far[i], arrays | sliced)

    loss_arrays = list_loss_working_set(shape)
    phases["the loss"] = _Phase(gradient_sums, kept_so_far[-1], loss_arrays)

    outer_specs = work.select_trained(work.non_layer_specs)
    outer_gradients = split.local_bytes(split.gradients, outer_specs)
    all_gradients = sum(stack_gradients) + gradient_sums + outer_gradients
    update_arrays = list_update_working_set(shape)
    phases["the update"] = _Phase(all_gradients, 0.0, update_arrays)
    return phases


def count_stored_bytes(shape: StepShape) -> dict[str, Number]:
    """Counts parameters, optimizer state, their moving average, frozen models, and the
    batch."""
    work = shape.work
    split = shape.split
    config = work.config
    parameters = split.local_bytes(split.storage, work.specs.values())
    average = 0.0
    if config.train.ema_decay is not None:
        average = parameters
    arrays = config.task.batch_arrays(config.data.seq_len).values()
    row_bytes = sum(
        np.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays
    )
    token_axes = (*split.compute.batch, *split.compute.seq)
    return {
        "parameters": parameters,
        "optimizer": split.local_bytes(split.optimizer, work.optimizer),
        "average": average,
        "frozen": split.local_bytes(split.storage, work.frozen_specs),
        "batch": config.data.batch_size * row_bytes / split.num_devices(token_axes),
    }


def _list_sliced_layers(shape: StepShape, stack: StackCosts) -> WorkingSet:
    """Lists what a scan whose turns have several layers takes out of their stack at
    once; a turn of one layer needs no copy."""
    if not 1 < stack.period < stack.num_layers:
        return {}
    stored = shape.split.local_bytes(shape.split.storage, stack.specs.values())
    gradients = _count_stack_gradients(shape, stack)
    turn_share = stack.period / stack.num_layers
    return {
        "parameters of a turn's layers, gradients": (stored + gradients) * turn_share
    }


def _count_stack_gradients(shape: StepShape, stack: StackCosts) -> Number:
    """Counts gradients of scanned layers while these are differentiated: matrices' in
    the compute dtype, vectors' in fp32."""
    split = shape.split

    def count_bytes(spec: ParamSpec) -> Number:
        itemsize = shape.work.dtype_bytes if spec.role == "matrix" else FP32
        return spec.size * itemsize / split.num_shards(split.gradients, spec.axes)

    return sum(count_bytes(spec) for spec in shape.work.select_trained(stack.specs))


def _count_scan_inputs(shape: StepShape, stack: StackCosts) -> Number:
    """Counts layers' inputs, which the scan keeps under any policy; of a pipeline,
    stages' inputs too; and an encoder's output for layers that look at it."""
    work = shape.work
    stages = shape.stages
    stream = shape.residual_tokens * work.config.model.d_model * work.dtype_bytes
    layers = shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage
    layer_inputs = layers * stack.token_ratio
    if shape.one_f_one_b:
        # As many micro-batches' as parallel/pipeline.py has room for.
        stage_inputs = 2 * stages - 1
    else:
        # Every turn's input, and three arrays of all micro-batches, spread over the
        # stages: what goes in, what comes out, and its gradient.
        stage_inputs = shape.pipeline_iterations + 3 * shape.micro_batches / stages
    encoder_outputs = 0.0
    if stack.cross_attention:
        encoder_outputs = work.tokens_per_row.encoder_tokens_per_decoder_token
    pipelined_inputs = np.where(shape.pipelined, stage_inputs, 0)
    return stream * (layer_inputs + encoder_outputs + pipelined_inputs)


def _count_saved_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts what the remat policy keeps of the layers that are differentiated
    together."""
    work = shape.work
    split = shape.split
    model = work.config.model
    itemsize = work.dtype_bytes
    without_remat = shape.remat == "none"
    saved_names = SAVED.get(shape.remat, ())
    if without_remat:
        saved_names = ("qkv", "attention", "mlp_up")
    self_heads = stack.heads()
    cross_heads = stack.heads("cross_attention")
    encoder_rate = work.tokens_per_row.encoder_tokens_per_decoder_token
    dense_groups = [group for group in stack.matmul_groups if group.is_dense_ffn]

    # Elements a token of a layer's width within branches.
    within = 0.0
    for heads, key_rate in (
        (self_heads, stack.token_ratio),
        (cross_heads, encoder_rate),
    ):
        widths = split.local_attention_widths(heads)
        if "qkv" in saved_names:
            keys_and_values = widths.keys + widths.values
            within += widths.queries + keys_and_values * key_rate / stack.token_ratio
        if "attention" in saved_names:
            # The output, and fp32 log-sum-exps of its heads.
            within += widths.output + widths.heads * FP32 / itemsize
    if "mlp_up" in saved_names:
        within += sum(
            split.local_ffn_elements_per_token(group) for group in dense_groups
        )

    # Elements a token in the residual stream's layout.
    residual = 0.0
    if without_remat:
        # One more array of the hidden width: what the map into the stream reads.
        within += sum(
            split.local_ffn_elements_per_token(group) / len(group.kernels)
            for group in dense_groups
        )
        # Narrow vectors before their norms and after, and heads before theirs.
        within += 2 * sum(group.latent_width for group in stack.matmul_groups)
        if self_heads is not None and self_heads.qk_norm:
            widths = split.local_attention_widths(self_heads)
            within += widths.queries + widths.keys
        if self_heads is None:
            within += sum(
                split.local_non_residual_width(group)
                for group in stack.matmul_groups
                if group.branch == "mixer"
            )
        stream_arrays = _KEPT_STREAM_ARRAYS[model.placement] + 2 * stack.cross_attention
        residual = model.d_model * stream_arrays

    elements = shape.micro_batch_tokens * within + shape.residual_tokens * residual
    elements = stack.token_ratio * elements
    expert_bytes = 0.0
    if stack.experts and without_remat:
        # Rows as they arrive, and an fp32 number for each.
        expert_bytes = shape.expert_buffer_rows * (model.d_model * itemsize + FP32)
    layers = shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage
    return layers * (elements * itemsize + expert_bytes)


def list_layer_working_sets(
    shape: StepShape, stack: StackCosts
) -> dict[str, WorkingSet]:
    """Lists what is alive besides while a layer of a stack is differentiated, by phase:
    one a branch."""
    work = shape.work
    encoder_rate = work.tokens_per_row.encoder_tokens_per_decoder_token
    sets: dict[str, WorkingSet] = {}
    self_heads = stack.heads()
    if self_heads is not None:
        has_biases = work.config.model.positions.kind == "relative"
        sets["a layer's attention"] = _list_attention_arrays(
            shape, stack, self_heads, stack.token_ratio, has_biases
        )
    else:
        sets["a layer's mixer"] = _list_mixer_arrays(shape, stack)
    cross_heads = stack.heads("cross_attention")
    if cross_heads is not None:
        sets["a layer's cross-attention"] = _list_attention_arrays(
            shape, stack, cross_heads, encoder_rate, False
        )
    for group in stack.matmul_groups:
        if group.is_dense_ffn:
            sets[f"a layer's {group.module}"] = _list_mlp_arrays(shape, stack, group)
    if stack.experts:
        sets["a layer's experts"] = _list_expert_arrays(shape, stack)

    stream = _count_stream_bytes(shape, stack)
    if work.config.model.placement == "sandwich":
        # Norms are in fp32.
        fp32_branch = 2 * stream / work.dtype_bytes * FP32
        for arrays in sets.values():
            arrays[_BRANCH_OUTPUT] = fp32_branch
    if stack.cross_attention:
        encoder_output = stream / stack.token_ratio * encoder_rate
        for arrays in sets.values():
            arrays[_ENCODER_OUTPUT] = encoder_output

    kernels = [kernel for group in stack.matmul_groups for kernel in group.kernels]
    all_frozen = not any(kernel.is_trained for kernel in kernels)
    if shape.unordered_frozen_layers and all_frozen:
        return {"a layer": _list_frozen_layer_arrays(shape, stack, sets)}
    return sets


def _list_frozen_layer_arrays(
    shape: StepShape, stack: StackCosts, branches: dict[str, WorkingSet]
) -> WorkingSet:
    """Lists the arrays of all branches together. Kernels into the stream that are
    stored in the compute dtype XLA:GPU copies into another layout, of all layers at
    once; others are cast layer by layer."""
    arrays = {
        f"{branch}: {name}": size
        for branch, branch_arrays in branches.items()
        for name, size in branch_arrays.items()
    }
    copied = []
    for spec in stack.base_specs.values():
        writes_stream = spec.role == "matrix" and spec.axes[-1] == "embed"
        itemsize = jnp.dtype(spec.dtype).itemsize
        if writes_stream and itemsize == shape.work.dtype_bytes:
            copied.append(spec)
    split = shape.split
    others = (group for group in stack.matmul_groups if group.branch != "ffn")
    gathered = sum((shape.gathered_weight_bytes(group) for group in others), start=0.0)
    return arrays | {
        "other kernels, gathered": gathered,
        "kernels into the stream, copied": split.local_bytes(split.storage, copied),
    }


def _count_stream_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts one array of the residual stream's width."""
    token_bytes = shape.work.config.model.d_model * shape.work.dtype_bytes
    return shape.residual_tokens * stack.token_ratio * token_bytes


def _list_mlp_arrays(
    shape: StepShape, stack: StackCosts, group: MatmulGroup
) -> WorkingSet:
    """Lists an MLP's maps' outputs and their cotangents, their kernels, the stream and
    its gradient, norms' inputs and outputs."""
    itemsize = shape.work.dtype_bytes
    num_maps = len(group.kernels)
    tokens = shape.micro_batch_tokens * stack.token_ratio
    all_maps = tokens * shape.split.local_ffn_elements_per_token(group)
    hidden = all_maps / num_maps * itemsize
    # Outputs that the backward pass makes again: the activation's alone where the maps'
    # are kept, theirs too where they are not; without remat none.
    if shape.remat == "none":
        remade_outputs = 0
    elif "mlp_up" in SAVED[shape.remat]:
        remade_outputs = 1
    else:
        remade_outputs = num_maps + 1
    stream = _count_stream_bytes(shape, stack)
    whole_stream = tokens * shape.work.config.model.d_model * itemsize
    # Where the sequence is gathered, the stream's width is there five times in both
    # lengths.
    is_gathered = np.greater(whole_stream, stream)
    stream_arrays = np.where(is_gathered, 5 * whole_stream + 4 * stream, 5 * stream)
    module = (other for other in stack.matmul_groups if other.module == group.module)
    kernels = sum((shape.gathered_weight_bytes(other) for other in module), start=0.0)
    return {
        _KERNELS: kernels,
        _HIDDEN: hidden * (remade_outputs + num_maps),
        _STREAM_AND_NORMS: stream_arrays,
    }


def _list_mixer_arrays(shape: StepShape, stack: StackCosts) -> WorkingSet:
    """Lists a headless mixer's arrays: its matrices' products, their fp32 states and
    gradients."""
    groups = [group for group in stack.matmul_groups if group.branch == "mixer"]
    tokens = shape.micro_batch_tokens * stack.token_ratio
    widths = (shape.split.local_non_residual_width(group) for group in groups)
    elements = tokens * sum(widths)
    kernels = sum((shape.gathered_weight_bytes(group) for group in groups), start=0.0)
    return {
        _KERNELS: kernels,
        "its products and their gradients": (
            2 * elements * (shape.work.dtype_bytes + FP32)
        ),
        _STREAM_AND_NORMS: 5 * _count_stream_bytes(shape, stack),
    }


def _list_attention_arrays(
    shape: StepShape,
    stack: StackCosts,
    heads: AttentionCosts,
    key_rate: float,
    has_biases: bool,
) -> WorkingSet:
    """Lists attention's arrays.

    Args:
        key_rate: keys in a row for each of the batch's tokens.
        has_biases: whether scores gain learnt biases, which keeps them from the fused
            kernel.
    """
    work = shape.work
    split = shape.split
    itemsize = work.dtype_bytes
    widths = split.local_attention_widths(heads)
    tokens = shape.micro_batch_tokens * stack.token_ratio

    tile_scores = 0.0
    if has_biases or not shape.fused_attention:
        # A tile of queries with all keys: scores, weights and their gradient
        # (pallas_kernels/attention/xla.py).
        num_queries = work.tokens_per_row.decoder * stack.token_ratio
        num_keys = work.tokens_per_row.decoder * key_rate
        tile_queries = min(max(128, num_queries / 16), num_queries)
        rows = shape.micro_batch_size * widths.heads
        one_array = rows * tile_queries * num_keys * FP32
        tile_scores = 3 * np.minimum(one_array, _SCORE_BYTES)

    # Keys and values of the whole sequence, where it is split over devices.
    keys = shape.micro_batch_tokens * key_rate * split.num_devices(split.compute.seq)
    # Gradients of queries, keys and values are in fp32, the output's in its own dtype.
    query_bytes = widths.queries * (itemsize + FP32) + widths.output * 2 * itemsize
    arrays = {
        "queries, output and their gradients": tokens * query_bytes,
        "keys, values and their gradients": (
            keys * (widths.keys + widths.values) * (itemsize + FP32)
        ),
        "scores of a tile": tile_scores,
        _STREAM_AND_NORMS: 4 * _count_stream_bytes(shape, stack),
    }
    latent_width = sum(group.latent_width for group in stack.matmul_groups)
    if latent_width:
        # The vectors before norms and after, and their gradients; parts of heads, not
        # yet joined.
        joined = widths.queries + widths.keys
        arrays["latent vectors, parts of heads"] = (
            tokens * itemsize * (4 * latent_width + joined)
        )
    return arrays


def _list_expert_arrays(shape: StepShape, stack: StackCosts) -> WorkingSet:
    rows = shape.expert_buffer_rows
    itemsize = shape.work.dtype_bytes
    d_model = shape.work.config.model.d_model
    groups = [group for group in stack.matmul_groups if group.has_experts]
    weights = sum(shape.gathered_weight_bytes(group) for group in groups)
    largest_kernel = max(kernel.size for group in groups for kernel in group.kernels)
    largest_share = largest_kernel / sum(group.size for group in groups)
    up_group = next(group for group in groups if group.output_features == "mlp")
    hidden_elements = rows * shape.split.local_ffn_elements_per_token(up_group)
    hidden = hidden_elements / len(up_group.kernels) * itemsize
    return {
        "kernels, gathered, and one's gradient": (1 + largest_share) * weights,
        "rows received and their gradients": rows * d_model * (2 * itemsize + FP32),
        # Larger ones are computed in chunks (parallel/experts.py).
        _HIDDEN: 3 * np.minimum(hidden, HIDDEN_BYTES),
        _STREAM_AND_NORMS: 4 * _count_stream_bytes(shape, stack),
    }


def list_loss_working_set(shape: StepShape) -> WorkingSet:
    """Lists what is alive besides while a chunk of the loss is differentiated."""
    work = shape.work
    split = shape.split
    model = work.config.model
    itemsize = work.dtype_bytes
    head_gradient = 0.0
    if work.head.is_trained:
        head_size = work.head.size / split.num_shards(split.compute, work.head.axes)
        head_gradient = head_size * FP32
    tokens = shape.embedding_loss_tokens
    chunk_tokens = np.minimum(work.config.task.chunk_tokens, tokens)
    logits = chunk_tokens * model.vocab_size / split.num_devices(split.compute.vocab)
    state_arrays = 5 + 3 * len(work.non_layer_kernels)
    return {
        "head, gathered": shape.gathered_weight_bytes(work.head),
        "its gradient": head_gradient,
        "logits of a chunk": logits * (FP32 + itemsize),
        "hidden states and their gradients": (
            state_arrays * tokens * model.d_model * itemsize
        ),
    }


def list_update_working_set(shape: StepShape) -> WorkingSet:
    """Lists the updates gathered, where each device updates a part of what it stores
    (ZeRO-1 and 2): the two largest parameters' are alive together."""
    work = shape.work
    split = shape.split
    gathered = []
    for spec in work.select_trained(work.specs):
        stored = split.local_bytes(split.storage, [spec])
        updated = split.local_bytes(split.optimizer, [spec])
        gathered.append(np.where(updated < stored, stored, 0.0))
    two_largest = np.sort(np.stack(np.broadcast_arrays(*gathered)), axis=0)[-2:]
    return {"updates, gathered": two_largest.sum(axis=0)}
