"""Main memory of a training step on each device, part by part.

What is stored between steps is exact. What a step adds follows how maxlm's step is
written: a scan keeps its layers' inputs and what the remat policy names, gradients of
scanned layers stay in the compute dtype until all layers are through, and one layer's
backward pass or the loss stands on top. Their working sets are counted in arrays that
are alive together, as XLA's buffer assignments show them (``benchmarks/plan_memory.py``
compares).

A plan holds one number for each figure, a search an array of them (``Number``): so no
formula here may branch on a mesh's sizes, only on the model's config.

``shape`` is a step on one device: the run (``shape.work``), how its mesh splits it
(``shape.split``, whose ``storage``, ``compute``, ``gradients`` and ``optimizer`` are
layouts), and the sizes of a micro-batch. Sizes are bytes on one device, or say what
else they count.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import jax.numpy as jnp
import numpy as np

from maxlm.models.costs import AttentionCosts
from maxlm.models.params import ParamSpec
from maxlm.models.remat import SAVED
from maxlm.parallel.experts import HIDDEN_BYTES
from maxlm.plan.stacks import MatmulGroup, StackCosts, get_num_streams
from maxlm.plan.workload import FP32, Number, StepShape

# SCORE_BYTES of pallas_kernels/attention/xla.py: bytes of a tile's scores at once. It is
# repeated here, since the plan imports no kernels.
_SCORE_BYTES = 1 << 26
WorkingSet = dict[str, Number]
"""Name of arrays that are alive together → bytes on each device."""
# Keys of working sets that several layers share.
_BRANCH_OUTPUT = "what a branch adds before its last norm, its gradient"
_ENCODER_OUTPUT = "gradient of the encoder's output"
_KERNELS = "kernels, gathered"
_STREAM_AND_NORMS = "residual stream, norms, their gradients"
_HIDDEN = "hidden activations and their gradients"
# Arrays of the residual stream's width that are alive together while a branch is
# differentiated: the stream, what its norms read and return, and their gradients, as
# XLA's buffer assignments show them.
_ATTENTION_STREAM_ARRAYS = 4
_MIXER_STREAM_ARRAYS = 5
_MLP_STREAM_ARRAYS = 5
_EXPERTS_STREAM_ARRAYS = 4


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
    caches: Number = 0.0
    """Caches of an engine that stay while the trainer runs."""

    @property
    def total(self) -> Number:
        """Bytes at the peak."""
        return sum((getattr(self, part) for part in PARTS), start=0.0)

    @property
    def transient_bytes(self) -> Number:
        """Bytes that a step takes and gives back."""
        return self.gradients + self.activations + self.working

    @property
    def peak_phase(self) -> str:
        """The phase in which one plan's peak is."""
        return list(self.working_sets)[int(self.peak_index)]

    def to_json(self) -> dict[str, float | str | dict[str, dict[str, float]]]:
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
    "caches",
)
"""Fields of :class:`DeviceMemory` that add up to its total."""
# Arrays of the residual stream's width that a layer without remat keeps, by where its
# norms stand; the layer's input is counted with the scan's.
_KEPT_STREAM_ARRAYS = {
    # Both norms' outputs, and the stream between the branches.
    "pre": 3,
    # Both norms' inputs, and the first one's output; the second's is the next layer's
    # input.
    "post": 3,
    # The outputs of the norms before branches and the inputs of those after them, and
    # the stream between the branches.
    "sandwich": 5,
    # Both norms' inputs, and the stream between the branches.
    "output": 3,
    # Both norms' outputs, which are the stream too, and the second one's input.
    "normed": 3,
    # Both norms' outputs; or that of the one that both branches read.
    "parallel": 2,
    "parallel_shared": 1,
}
# The same of a layer with one branch alone.
_KEPT_ONE_BRANCH_ARRAYS = {
    "pre": 1,
    "post": 1,
    "sandwich": 2,
    "output": 1,
    "normed": 1,
    "parallel": 1,
    "parallel_shared": 1,
}
# With cross-attention also its norm's output, and the stream after it.
_KEPT_CROSS_ATTENTION_STREAM_ARRAYS = 2


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

    # While a run of layers is differentiated, the runs before it still wait with what
    # their forward passes have kept. The layers of a run take turns in its stacks.
    runs: dict[str, list[StackCosts]] = {}
    for stack in stacks:
        runs.setdefault(stack.first_stack_of_run, []).append(stack)
    kept_by_run = []
    for run in runs.values():
        saved_bytes = _count_stage_inputs(shape)
        for stack in run:
            saved_bytes += _count_saved_bytes(shape, stack)
            saved_bytes += _count_scan_inputs(shape, stack)
        kept_by_run.append(saved_bytes)
    kept_by_run[0] = kept_by_run[0] + _count_frontend_bytes(shape)
    kept_by_run[0] = kept_by_run[0] + _count_layer_input_bytes(shape)
    kept_by_run[0] = kept_by_run[0] + _count_shared_keys_bytes(shape)
    kept_by_run[0] = kept_by_run[0] + _count_shared_block_bytes(shape)
    shared_gradients = split.local_bytes(
        split.gradients, work.select_trained(work.shared_specs)
    )
    kept_so_far = list(accumulate(kept_by_run))
    run_gradients = [
        sum(_count_stack_gradients(shape, stack) for stack in run)
        for run in runs.values()
    ]

    phases: dict[str, _Phase] = {}
    for i, run in enumerate(runs.values()):
        # Gradients of later runs are complete; or they are among the sums already.
        later = sum(run_gradients[i + 1 :], start=0.0)
        later = np.where(sums_gradients, 0.0, later)
        gradients = run_gradients[i] + later + gradient_sums + shared_gradients
        sliced = _list_sliced_layers(shape, run)
        for stack in run:
            for name, working_set in list_layer_working_sets(shape, stack).items():
                if len(stacks) > 1:
                    name = f"{name}, {stack.name}"
                phases[name] = _Phase(gradients, kept_so_far[i], working_set | sliced)

    # The loss stands between the forward passes of all layers and their backward
    # passes.
    loss_working_set = list_loss_working_set(shape)
    phases["the loss"] = _Phase(gradient_sums, kept_so_far[-1], loss_working_set)

    outer_specs = work.select_trained(work.non_layer_specs)
    outer_gradients = split.local_bytes(split.gradients, outer_specs)
    all_gradients = sum(run_gradients) + gradient_sums + outer_gradients
    update_working_set = list_update_working_set(shape)
    phases["the update"] = _Phase(all_gradients, 0.0, update_working_set)
    return phases


def count_stored_bytes(shape: StepShape) -> dict[str, Number]:
    """Counts parameters, optimizer state, their moving average, frozen models, those
    that score among them, and the batch: of the device that holds most."""
    work = shape.work
    split = shape.split
    config = work.config
    parameters = split.local_bytes(split.storage, work.specs.values())
    optimizer = split.local_bytes(split.optimizer, work.optimizer)
    for other in work.auxiliary_models.values():
        parameters += split.local_bytes(split.storage, other.specs.values())
        optimizer += split.local_bytes(split.optimizer, other.optimizer)
    average = 0.0
    if config.train.ema_decay is not None:
        average = parameters
    # Each device has its share of a batch's rows, and of the sequence of arrays that
    # have one.
    row_bytes = sum(
        np.prod(array.shape)
        * np.dtype(array.dtype).itemsize
        / split.num_shards(split.compute, ("batch", *array.axes))
        for array in config.batch_arrays.values()
    )
    scoring = [
        model.count_param_bytes(split.sizes) for model in work.scoring_models.values()
    ]
    frozen = split.local_bytes(split.storage, work.frozen_specs)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "average": average,
        "frozen": frozen + sum(scoring),
        "batch": config.data.batch_size * row_bytes,
    }


def _list_sliced_layers(shape: StepShape, run: list[StackCosts]) -> WorkingSet:
    """Lists what a scan whose turns have several layers of a stack takes out of it at
    once. A turn of one layer needs no copy; nor does a single turn, which takes
    all."""
    sliced_bytes = 0.0
    for stack in run:
        if not 1 < stack.period < stack.num_layers:
            continue
        stored = shape.split.local_bytes(shape.split.storage, stack.specs.values())
        gradients = _count_stack_gradients(shape, stack)
        turn_share = stack.period / stack.num_layers
        sliced_bytes += (stored + gradients) * turn_share
    if isinstance(sliced_bytes, float) and not sliced_bytes:
        return {}
    return {"parameters of a turn's layers, gradients": sliced_bytes}


def _count_stack_gradients(shape: StepShape, stack: StackCosts) -> Number:
    """Counts gradients of scanned layers while these are differentiated: matrices' in
    the compute dtype, vectors' in fp32."""
    split = shape.split

    def count_bytes(spec: ParamSpec) -> Number:
        itemsize = shape.work.dtype_bytes if spec.role == "matrix" else FP32
        return spec.size * itemsize / split.num_shards(split.gradients, spec.axes)

    return sum(count_bytes(spec) for spec in shape.work.select_trained(stack.specs))


def _count_frontend_bytes(shape: StepShape) -> Number:
    """Counts what a frontend's matrices write, which is kept until its backward pass;
    of all micro-batches at once where these run together through a pipeline."""
    frontend = shape.work.frontend
    if frontend is None:
        return 0.0
    split = shape.split
    width = 0.0
    for kernel in frontend.kernels:
        output_size = prod(kernel.shape[kernel.num_input_dims :])
        output_axes = kernel.axes[kernel.num_input_dims :]
        width += output_size / split.num_shards(split.compute, output_axes)
    is_spread = shape.pipelined & (not shape.one_f_one_b)
    micro_batches_at_once = np.where(is_spread, shape.micro_batches, 1.0)
    rows = micro_batches_at_once * shape.count_frontend_rows()
    return rows * width * shape.work.dtype_bytes


def _count_layers_at_once(shape: StepShape, stack: StackCosts) -> Number:
    """Counts the layers of a stack that a device differentiates without a break: its
    stage's, or one group of them (the circular schedule)."""
    return shape.per_stage(stack.num_layers) / shape.layer_groups_per_stage


def _count_scan_inputs(shape: StepShape, stack: StackCosts) -> Number:
    """Counts layers' inputs, which the scan keeps under any policy; and an encoder's
    output for layers that look at it."""
    work = shape.work
    layer_inputs = _count_layers_at_once(shape, stack) * stack.token_ratio
    encoder_outputs = 0.0
    if stack.cross_attention:
        encoder_outputs = work.tokens_per_row.encoder_tokens_per_decoder_token
    return _count_input_bytes(shape) * (layer_inputs + encoder_outputs)


def _count_stage_inputs(shape: StepShape) -> Number:
    """Counts stages' inputs in a pipeline."""
    stages = shape.stages
    if shape.one_f_one_b:
        # As many micro-batches' as parallel/pipeline.py has room for.
        stage_inputs = 2 * stages - 1
    else:
        # Every turn's input, and three arrays of all micro-batches, spread over the
        # stages: what goes in, what comes out, and its gradient.
        stage_inputs = shape.pipeline_iterations + 3 * shape.micro_batches / stages
    return _count_input_bytes(shape) * np.where(shape.pipelined, stage_inputs, 0)


def _count_input_bytes(shape: StepShape) -> Number:
    """Counts bytes of a micro-batch in the residual stream, or in all of several."""
    work = shape.work
    model = work.config.model
    width = get_num_streams(model) * model.d_model
    return shape.residual_tokens * width * work.dtype_bytes


def _count_layer_input_bytes(shape: StepShape) -> Number:
    """Counts inputs of each layer's own [L, B, S, P], which are there with their
    gradient from before the first layer on; and the rows and projections they are made
    of, which are kept for their norm."""
    model = shape.work.config.model
    if model.layer_inputs is None:
        return 0.0
    split = shape.split
    elements = model.num_layers * model.layer_inputs.width
    # Layers read a part of each, split like an MLP's hidden layer; they are made whole.
    read = 2 * elements / split.num_shards(split.compute, ("mlp",))
    whole = 2 * elements
    return shape.micro_batch_tokens * (read + whole) * shape.work.dtype_bytes


def _count_shared_keys_bytes(shape: StepShape) -> Number:
    """Counts keys and values that later layers read, with their gradients: of the last
    layer of each kind, which the scan carries, and of each layer that reads those of
    its scan, which keeps its own. (Those that an earlier scan made stay as they are.)"""
    model = shape.work.config.model
    split = shape.split
    elements = 0.0
    for run in model.layer_runs:
        for place in run.iterate_places():
            kind = run.kinds[place.kind_index]
            attention = model.get_attention(kind)
            if kind.keys_of not in run.kind_names or attention is None:
                continue
            elements += 2 * attention.num_kv_heads * attention.head_dim
    for name in model.shared_kinds:
        attention = model.get_attention(model.kinds[name])
        if attention is not None:
            elements += 2 * 2 * attention.num_kv_heads * attention.head_dim
    num_shards = split.num_shards(split.compute, ("kv_heads",))
    return shape.micro_batch_tokens * elements / num_shards * shape.work.dtype_bytes


def _count_shared_block_bytes(shape: StepShape) -> Number:
    """Counts matrices that several layers share, as all of them read these: cast to the
    compute dtype, in their shares of storage; and the embeddings beside the stream,
    with their gradient."""
    work = shape.work
    if not work.shared_readers:
        return 0.0
    split = shape.split
    matrices = sum(
        spec.size / split.num_shards(split.storage, spec.axes)
        for spec in work.shared_specs.values()
        if spec.role == "matrix"
    )
    return matrices * work.dtype_bytes + 2 * _count_input_bytes(shape)


def _count_saved_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts what the remat policy keeps of the layers that are differentiated
    together."""
    model = shape.work.config.model
    itemsize = shape.work.dtype_bytes
    # Elements a token: within branches, which may split it over more devices or fewer
    # than the residual stream does, and in the stream.
    branch_elements = _count_named_elements(shape, stack)
    stream_elements = 0.0
    expert_bytes = 0.0
    if shape.remat == "none":
        branch_elements += _count_unnamed_elements(shape, stack)
        if stack.num_branches == 1:
            stream_arrays = _KEPT_ONE_BRANCH_ARRAYS[stack.placement]
        else:
            stream_arrays = _KEPT_STREAM_ARRAYS[stack.placement]
        if stack.cross_attention:
            stream_arrays += _KEPT_CROSS_ATTENTION_STREAM_ARRAYS
        # Every stream is kept as it enters a layer, as it is predicted and corrected.
        other_streams = 3 * (stack.num_streams - 1)
        stream_elements = model.d_model * (stream_arrays + other_streams)
        if stack.experts:
            # Rows as they arrive, and an fp32 number for each.
            row_width = stack.experts.input_dim or model.d_model
            row_bytes = row_width * itemsize + FP32
            expert_bytes = shape.expert_buffer_rows * row_bytes

    elements = (
        shape.micro_batch_tokens * branch_elements
        + shape.residual_tokens * stream_elements
    )
    layer_bytes = stack.token_ratio * elements * itemsize + expert_bytes
    if _keeps_by_name(shape, "attention"):
        layer_bytes += _count_state_bytes(shape, stack)
    return _count_layers_at_once(shape, stack) * layer_bytes


def _keeps_by_name(shape: StepShape, name: str) -> bool:
    """Whether layers keep arrays of that name for their backward pass
    (``models/remat.py``)."""
    return shape.remat == "none" or name in SAVED[shape.remat]


def _list_other_mixer_groups(stack: StackCosts) -> list[MatmulGroup]:
    """Lists the matrices of a mixer that is no attention, or is beside it."""
    has_heads = stack.heads() is not None
    return [
        group
        for group in stack.matmul_groups
        if group.branch == "mixer" and (group.is_beside_attention or not has_heads)
    ]


def _count_state_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts the states that one layer's recurrence keeps of a micro-batch: its own, and
    of a sequence split over devices what every run does to a state, and the state before
    it."""
    split = shape.split
    num_runs, run_tokens = _count_runs(shape, stack)
    size = 0.0
    for branch in stack.branches:
        costs = branch.costs
        if costs.state_elements:
            num_states = num_runs * np.ceil(run_tokens / costs.state_tokens)
            num_shards = split.num_shards(split.compute, costs.flops_axes)
            size += num_states * costs.state_elements * FP32 / num_shards
    return size + _count_exchanged_bytes(shape, stack)


def _count_exchanged_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts what devices that share sequences exchange of all runs of a micro-batch's
    rows, gathered."""
    split = shape.split
    sequence_ways = split.num_devices(split.compute.seq)
    num_runs, _ = _count_runs(shape, stack)
    elements = 0.0
    for branch in stack.branches:
        num_shards = split.num_shards(split.compute, branch.costs.flops_axes)
        elements += branch.costs.exchanged_elements / num_shards
    gathered = sequence_ways * num_runs * elements * FP32
    return np.where(np.greater(sequence_ways, 1), gathered, 0.0)


def _count_runs(shape: StepShape, stack: StackCosts) -> tuple[Number, Number]:
    """Counts the runs of neighbouring tokens that a device has of a micro-batch, and
    the tokens of one."""
    sequence_ways = shape.split.num_devices(shape.split.compute.seq)
    is_balanced = shape.work.config.parallel.balance_sequence
    runs_per_row = np.where(np.greater(sequence_ways, 1) & is_balanced, 2, 1)
    row_tokens = shape.work.tokens_per_row.decoder * stack.token_ratio
    run_tokens = row_tokens / sequence_ways / runs_per_row
    return shape.micro_batch_size * runs_per_row, run_tokens


def count_stated_elements(
    shape: StepShape,
    stack: StackCosts,
    name: Literal["saved_elements", "intermediate_elements"],
) -> Number:
    """Counts elements a token on a device that modules of a layer state in a field of
    :class:`~maxlm.models.costs.LayerCosts`."""
    split = shape.split
    elements = 0.0
    for branch in stack.branches:
        num_shards = split.num_shards(split.compute, branch.costs.flops_axes)
        elements += getattr(branch.costs, name) / num_shards
    return elements


def _count_named_elements(shape: StepShape, stack: StackCosts) -> Number:
    """Counts elements a token of a layer's arrays that the remat policy keeps by their
    names (``models/remat.py``); without remat those of all names."""
    split = shape.split
    itemsize = shape.work.dtype_bytes
    keeps_qkv = _keeps_by_name(shape, "qkv")
    keeps_attention = _keeps_by_name(shape, "attention")
    elements = 0.0

    # Heads of a branch (None: it has none, and its widths are 0), and keys for each of
    # the batch's tokens.
    encoder_rate = shape.work.tokens_per_row.encoder_tokens_per_decoder_token
    branches = (
        (stack.heads(), stack.token_ratio),
        (stack.heads("cross_attention"), encoder_rate),
    )
    for heads, key_rate in branches:
        widths = split.local_attention_widths(heads)
        if keeps_qkv and heads is not None:
            elements += widths.queries + widths.gates
        if keeps_qkv and heads is not None and heads.makes_keys:
            # Keys are as many as the tokens that they are of, not as the queries.
            keys_and_values = widths.keys + widths.values
            keys_and_values = keys_and_values * key_rate / stack.token_ratio
            elements += keys_and_values
        if keeps_attention:
            # The output, and log-sum-exps of its heads in fp32, as elements of the
            # compute dtype.
            log_sum_exps = widths.heads * FP32 / itemsize
            elements += widths.output + log_sum_exps

    if keeps_qkv:
        elements += sum(
            split.local_non_residual_width(group, named_qkv=True)
            for group in _list_other_mixer_groups(stack)
        )
    if keeps_attention:
        elements += count_stated_elements(shape, stack, "saved_elements")
    if _keeps_by_name(shape, "mlp_up"):
        elements += sum(
            split.local_ffn_elements_per_token(group)
            for group in stack.matmul_groups
            if group.is_dense_ffn
        )
    return elements


def _count_unnamed_elements(shape: StepShape, stack: StackCosts) -> Number:
    """Counts elements a token of the arrays without a name that a layer without remat
    keeps within its branches."""
    split = shape.split
    # One more array of the hidden width: what the map into the stream reads. A group's
    # elements are those of all its maps' outputs (gate and up).
    elements = sum(
        split.local_ffn_elements_per_token(group) / len(group.kernels)
        for group in stack.matmul_groups
        if group.is_dense_ffn
    )
    # Of other mixers than attention what they state and products without a name.
    mixer_groups = _list_other_mixer_groups(stack)
    elements += count_stated_elements(shape, stack, "intermediate_elements")
    elements += sum(
        split.local_non_residual_width(group, named_qkv=False) for group in mixer_groups
    )
    # Narrow vectors before their norms and after.
    elements += 2 * sum(
        group.latent_width for group in stack.matmul_groups if group not in mixer_groups
    )
    heads = stack.heads()
    if heads is None:
        return elements
    widths = split.local_attention_widths(heads)
    if heads.qk_norm:
        # Queries and keys before their norms.
        elements += widths.queries + widths.keys
    if heads.gate_dim:
        # The output behind its gate, which the map back reads.
        elements += widths.output
    return elements


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
    if _list_other_mixer_groups(stack):
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
    # Arrays that all branches of a layer share.
    if stack.placement in ("sandwich", "output"):
        # A branch's output and its gradient, in fp32 as the norm after it reads them.
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
    """Lists the arrays of all branches of a layer with frozen kernels together: nothing
    puts the branches in order there (``StepShape.unordered_frozen_layers``). Kernels
    into the stream that are stored in the compute dtype XLA:GPU copies into another
    layout, of all layers at once; others are cast layer by layer."""
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
    # The working set of an FFN has its own kernels already.
    gathered = sum(
        (
            shape.gathered_weight_bytes(group)
            for group in stack.matmul_groups
            if group.branch != "ffn"
        ),
        start=0.0,
    )
    return arrays | {
        "other kernels, gathered": gathered,
        "kernels into the stream, copied": split.local_bytes(split.storage, copied),
    }


def _count_stream_bytes(shape: StepShape, stack: StackCosts) -> Number:
    """Counts one array of the residual stream's width, or of all streams'."""
    width = stack.num_streams * shape.work.config.model.d_model
    token_bytes = width * shape.work.dtype_bytes
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
    # The residual stream may split the sequence further than layers do (sequence
    # parallelism): then its arrays are gathered before the MLP, and all but one of them
    # are there in the split length too.
    stream = _count_stream_bytes(shape, stack)
    gathered_stream = tokens * shape.work.config.model.d_model * itemsize
    num_arrays = _MLP_STREAM_ARRAYS
    stream_arrays = np.where(
        np.greater(gathered_stream, stream),
        num_arrays * gathered_stream + (num_arrays - 1) * stream,
        num_arrays * stream,
    )
    kernels = sum(
        (
            shape.gathered_weight_bytes(module_group)
            for module_group in stack.matmul_groups
            if module_group.module == group.module
        ),
        start=0.0,
    )
    return {
        _KERNELS: kernels,
        _HIDDEN: hidden * (remade_outputs + num_maps),
        _STREAM_AND_NORMS: stream_arrays,
    }


def _list_mixer_arrays(shape: StepShape, stack: StackCosts) -> WorkingSet:
    """Lists the arrays of a mixer that is no attention: its matrices' products, what it
    states itself (``LayerCosts``), and gradients of all these."""
    split = shape.split
    itemsize = shape.work.dtype_bytes
    groups = _list_other_mixer_groups(stack)
    tokens = shape.micro_batch_tokens * stack.token_ratio
    kernels = sum((shape.gathered_weight_bytes(group) for group in groups), start=0.0)
    named_products = sum(
        split.local_non_residual_width(group, named_qkv=True) for group in groups
    )
    other_products = sum(
        split.local_non_residual_width(group, named_qkv=False) for group in groups
    )
    outputs = count_stated_elements(shape, stack, "saved_elements")
    intermediates = count_stated_elements(shape, stack, "intermediate_elements")

    # Arrays that the backward pass makes again, and gradients.
    remade = 0.0
    if shape.remat != "none":
        remade += other_products + intermediates
    if not _keeps_by_name(shape, "qkv"):
        remade += named_products
    remade_states = 0.0
    if not _keeps_by_name(shape, "attention"):
        remade += outputs
        remade_states = _count_state_bytes(shape, stack)
    gradients = named_products + other_products + outputs + intermediates
    return {
        _KERNELS: kernels,
        "products and other arrays, made again": tokens * remade * itemsize,
        "their gradients": tokens * gradients * itemsize,
        "states": remade_states,
        # Maps of states and states, gathered and in the runs' order, and the gradients
        # of both.
        "states of all runs": 4 * _count_exchanged_bytes(shape, stack),
        "chunks of the mixer": tokens * _count_chunk_elements(shape, stack) * FP32,
        _STREAM_AND_NORMS: _MIXER_STREAM_ARRAYS * _count_stream_bytes(shape, stack),
    }


def _count_chunk_elements(shape: StepShape, stack: StackCosts) -> Number:
    """Counts elements a token, in fp32, of what a mixer works with besides: for all
    tokens, or for a block of them at a time."""
    split = shape.split
    _, run_tokens = _count_runs(shape, stack)
    elements = 0.0
    for branch in stack.branches:
        costs = branch.costs
        num_shards = split.num_shards(split.compute, costs.flops_axes)
        if shape.fused_recurrence:
            stated = costs.working_elements + costs.kernel_elements
        else:
            block_share = np.minimum(1.0, costs.block_tokens / run_tokens)
            chunk_share = np.minimum(1.0, run_tokens / costs.chunk_tokens)
            block_elements = block_share * chunk_share * costs.block_elements
            stated = costs.working_elements + block_elements
        elements += stated / num_shards
    return elements


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
    index_scores = 0.0
    if has_biases or heads.index_dim or not shape.fused_attention:
        # A tile of queries with all keys, in fp32: scores, weights and their gradient.
        # A row has 16 tiles, but none of less than 128 queries (tile_size of
        # pallas_kernels/attention/tiles.py).
        num_queries = work.tokens_per_row.decoder * stack.token_ratio
        num_keys = work.tokens_per_row.decoder * key_rate
        tile_queries = min(max(128, num_queries / 16), num_queries)
        if heads.index_dim:
            # A tile of models/layers/sparse.py. Of an indexer's heads there are
            # products, what is left of them above 0, and the gradients of both.
            tile_queries = min(128, num_queries)
            index_rows = shape.micro_batch_size * heads.index_heads
            index_scores = 4 * index_rows * tile_queries * num_keys * FP32
        rows = shape.micro_batch_size * widths.heads
        one_array = rows * tile_queries * num_keys * FP32
        tile_scores = 3 * np.minimum(one_array, _SCORE_BYTES)

    # Keys and values of the whole sequence, where it is split over devices.
    keys = shape.micro_batch_tokens * key_rate * split.num_devices(split.compute.seq)
    # Gradients of queries, keys and values are in fp32, the output's in its own dtype.
    query_bytes = widths.queries * (itemsize + FP32) + widths.output * 2 * itemsize
    query_bytes += widths.gates * 2 * itemsize
    arrays = {
        "queries, output and their gradients": tokens * query_bytes,
        "keys, values and their gradients": (
            keys * (widths.keys + widths.values) * (itemsize + FP32)
        ),
        "scores of a tile": tile_scores,
        _STREAM_AND_NORMS: (
            _ATTENTION_STREAM_ARRAYS * _count_stream_bytes(shape, stack)
        ),
    }
    index_width = sum(
        split.local_non_residual_width(group)
        for group in stack.matmul_groups
        if group.branch == "mixer" and group.output_features == "whole"
    )
    if heads.index_dim:
        arrays["an indexer's scores of a tile"] = index_scores
        # With gradients, beside what is normed and turned of them.
        arrays["an indexer's queries, keys and weights"] = (
            3 * tokens * index_width * itemsize
        )
    latent_width = sum(
        group.latent_width for group in stack.matmul_groups if group.branch != "ffn"
    )
    if latent_width:
        # The vectors before norms and after, and their gradients; parts of heads, not
        # yet joined.
        joined = widths.queries + widths.keys
        arrays["latent vectors, parts of heads"] = (
            tokens * itemsize * (4 * latent_width + joined)
        )
    return arrays


def _list_expert_arrays(shape: StepShape, stack: StackCosts) -> WorkingSet:
    """Lists the arrays of routed experts: their kernels, the rows that they receive,
    and hidden activations."""
    rows = shape.expert_buffer_rows
    itemsize = shape.work.dtype_bytes
    assert stack.experts is not None
    row_width = stack.experts.input_dim or shape.work.config.model.d_model
    groups = [group for group in stack.matmul_groups if group.has_experts]
    # Beside all kernels one's gradient is alive: at the peak the largest's.
    weights = sum(shape.gathered_weight_bytes(group) for group in groups)
    largest_kernel = max(kernel.size for group in groups for kernel in group.kernels)
    largest_share = largest_kernel / sum(group.size for group in groups)
    up_group = next(group for group in groups if group.output_features == "mlp")
    hidden_elements = rows * shape.split.local_ffn_elements_per_token(up_group)
    hidden = hidden_elements / len(up_group.kernels) * itemsize
    return {
        "kernels, gathered, and one's gradient": (1 + largest_share) * weights,
        "rows received and their gradients": rows * row_width * (2 * itemsize + FP32),
        # Three hidden activations or gradients at once; larger ones are computed in
        # chunks (parallel/experts.py).
        _HIDDEN: 3 * np.minimum(hidden, HIDDEN_BYTES),
        _STREAM_AND_NORMS: _EXPERTS_STREAM_ARRAYS * _count_stream_bytes(shape, stack),
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
    # Hidden states and gradients of them, as XLA's buffer assignments show them: more
    # of them where matrices stand between the layers and the head.
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
