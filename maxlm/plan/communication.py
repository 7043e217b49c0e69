"""Every collective of a training step, from layouts alone.

All communication of maxlm is written out in programs on shards (``maxlm/parallel``), so
that it can be told without tracing anything: what a map sends follows from how its
input, its kernels and its output lie (the table in ``parallel/linear.py``), and so for
attention, experts, the embedding, the loss, pipelines and the optimizer. Where an axis
has one device, a collective has no bytes.

As in ``plan/memory.py``, figures are numbers or arrays of them, one element a candidate
of a search.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.models.costs import BranchCosts
from maxlm.parallel.context import count_ring_steps
from maxlm.parallel.terms import limit_window
from maxlm.plan.network import PlannedCollective
from maxlm.plan.stacks import AttentionShape, Kernel, MatmulGroup, make_kernel
from maxlm.plan.workload import FP32, Number, StepShape
from maxlm.sharding import AxisRules

MeshAxes = tuple[str, ...]


class _Runs(NamedTuple):
    """Times that a collective runs in a step, in its passes forward and backward."""

    forward: Number
    backward: Number


def list_collectives(shape: StepShape) -> tuple[PlannedCollective, ...]:
    """Lists every collective of a step that sends more than a few scalars."""
    collectives = chain(
        _list_layer_collectives(shape),
        _list_expert_collectives(shape),
        _list_outer_collectives(shape),
        _list_pipeline_collectives(shape),
        _list_update_collectives(shape),
    )
    return tuple(
        collective
        for collective in collectives
        if collective.axes and np.any(collective.whole_bytes * collective.count)
    )


def _in_both_passes(
    content: str,
    kind: str,
    axes: MeshAxes,
    size: Number,
    runs: _Runs,
    *,
    waits: bool = True,
) -> Iterator[PlannedCollective]:
    """Yields one collective of ``size`` bytes, in so many runs of each pass."""
    yield PlannedCollective(content, kind, axes, size, runs.forward, "forward", waits)
    yield PlannedCollective(content, kind, axes, size, runs.backward, "backward", waits)


def _count_layer_passes(shape: StepShape, layers: Number) -> _Runs:
    """Counts passes of single layers in a step, of so many layers in all: a pipeline's
    backward pass runs a stage forward once more, to differentiate it."""
    backward = shape.stage_passes_with_bubble * shape.per_stage(layers)
    forward = backward * np.where(shape.pipelined, 2, 1)
    return _Runs(forward, backward)


def _without(axes: Iterable[str], excluded: Iterable[str]) -> MeshAxes:
    """Returns mesh axes in their order but for the excluded ones."""
    excluded = set(excluded)
    return tuple(axis for axis in axes if axis not in excluded)


def _list_layer_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work = shape.work
    rules = shape.split.compute
    for group, layers in work.matmul_layer_counts.items():
        if not group.has_experts:
            passes = _count_layer_passes(shape, layers)
            yield from _list_matmul_collectives(shape, group, passes)
    for attention, layers in work.attention_layer_counts.items():
        passes = _count_layer_passes(shape, layers)
        yield from _list_attention_collectives(shape, attention, passes)

    yield from _list_vector_collectives(shape)
    for stack in work.stacks:
        passes = _count_layer_passes(shape, stack.num_layers)
        for branch in stack.branches:
            yield from _list_recurrence_collectives(
                shape, branch, stack.token_ratio, passes
            )

    token_axes = (*rules.batch, *rules.seq)
    for stack in work.stacks:
        passes = _count_layer_passes(shape, stack.num_layers)
        for kernel in stack.adapter_kernels:
            yield from _list_weight_collectives(shape, kernel, passes, token_axes)


def _list_vector_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists sums over all tokens of gradients of what is no matrix, layer by layer, in
    fp32: of norms, which see the residual stream, and of vectors of inner features,
    each device's of its own."""
    work = shape.work
    rules = shape.split.compute
    norm_elements = 0
    inner_elements: Number = 0
    for spec in work.select_trained(work.specs):
        # One with sign_update has no gradient of the loss (ParamSpec); those of experts
        # come with their kernels', and routers' tables of the stream's features too.
        is_of_experts = "expert" in spec.axes
        is_router = spec.role == "table" and "embed" in spec.axes
        is_listed = spec.sign_update or is_of_experts or is_router
        if spec.role == "matrix" or not spec.num_layer_axes or is_listed:
            continue
        feature_axes = spec.axes[spec.num_layer_axes :]
        if _mesh_axes(rules, feature_axes):
            num_shards = shape.split.num_shards(rules, feature_axes)
            inner_elements = inner_elements + spec.size / num_shards
        else:
            norm_elements += spec.size
    passes = _count_layer_passes(shape, work.num_layers)
    for content, token_axes, elements in (
        ("norms: gradients", (*rules.batch, *rules.residual), norm_elements),
        ("inner vectors: gradients", (*rules.batch, *rules.seq), inner_elements),
    ):
        yield PlannedCollective(
            content,
            "all-reduce",
            token_axes,
            elements / work.num_layers * FP32,
            passes.backward,
            "backward",
            waits=False,
        )


def _list_recurrence_collectives(
    shape: StepShape, branch: BranchCosts, token_ratio: float, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists what devices exchange within a mixer that passes a state from token to
    token, where they split its features or its sequence."""
    work = shape.work
    split = shape.split
    rules = split.compute
    costs = branch.costs
    feature_axes = tuple(sorted(_mesh_axes(rules, costs.flops_axes)))
    if costs.shared_elements:
        tokens = shape.micro_batch_tokens * token_ratio
        yield PlannedCollective(
            f"{branch.module}: gradients of what all features read",
            "all-reduce",
            feature_axes,
            tokens * costs.shared_elements * work.dtype_bytes,
            passes.backward,
            "backward",
        )
    is_recomputed = shape.remat != "none"
    if costs.reduced_elements:
        # The norm that reads them makes its input again under any policy.
        sums = 3 if is_recomputed else 2
        yield from _in_both_passes(
            f"{branch.module}: norm over all heads",
            "all-reduce",
            feature_axes,
            shape.micro_batch_tokens * token_ratio * costs.reduced_elements * FP32,
            _Runs(passes.forward, sums * passes.backward),
        )
    runs_per_device = 2 if work.config.parallel.balance_sequence else 1
    num_runs = shape.micro_batch_size * split.num_devices(rules.seq) * runs_per_device
    num_shards = split.num_shards(rules, costs.flops_axes)
    # What remat policies keep of attention, they keep of a recurrence, but of no
    # convolution.
    states_again = work.is_attention_recomputed(shape.remat)
    for content, elements, itemsize, is_made_again in (
        ("states of runs", costs.exchanged_elements, FP32, states_again),
        ("last inputs of runs", costs.halo_elements, work.dtype_bytes, is_recomputed),
    ):
        if not elements:
            continue
        size = num_runs * elements / num_shards * itemsize
        gathers_again = passes.backward if is_made_again else 0
        content = f"{branch.module}: {content}"
        yield from _in_both_passes(
            content,
            "all-gather",
            rules.seq,
            size,
            _Runs(passes.forward, gathers_again),
        )
        yield PlannedCollective(
            content, "reduce-scatter", rules.seq, size, passes.backward, "backward"
        )


def _list_matmul_collectives(
    shape: StepShape, group: MatmulGroup, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists those of matrices that are multiplied with one input
    (``parallel/linear.py``)."""
    work = shape.work
    rules = shape.split.compute
    forward, backward = passes

    # The kernels themselves; and the mesh axes that split their inputs and outputs.
    is_in_stream_layout = work.is_in_stream_layout(group)
    token_axes = (*rules.batch, *(rules.residual if is_in_stream_layout else rules.seq))
    input_axes: set[str] = set()
    output_axes: set[str] = set()
    for kernel in group.kernels:
        yield from _list_weight_collectives(shape, kernel, passes, token_axes)
        input_axes |= _mesh_axes(rules, kernel.axes[: kernel.num_input_dims])
        output_axes |= _mesh_axes(rules, kernel.axes[kernel.num_input_dims :])

    # Activations: the arrays that are sent are as wide as the residual stream, or as a
    # latent vector, or as two streams side by side; all have the same bytes.
    is_latent = group.input_features == "latent"
    width = work.config.model.d_model
    if is_latent or group.input_features == "residual":
        first_kernel = group.kernels[0]
        width = prod(first_kernel.shape[: first_kernel.num_input_dims])
    tokens = shape.micro_batch_tokens * group.token_ratio
    activation_bytes = tokens * work.dtype_bytes * width

    def send(
        content: str, kind: str, axes: MeshAxes, forward: Number, backward: Number
    ) -> Iterator[PlannedCollective]:
        """Yields a collective with its runs forward and backward."""
        return _in_both_passes(
            f"{group.name}: {content}",
            kind,
            axes,
            activation_bytes,
            _Runs(forward, backward),
        )

    # Axes that split the residual stream's sequence alone: Megatron's sequence
    # parallelism gathers and scatters over them where it would all-reduce.
    sequence_axes = () if is_in_stream_layout else shape.split.sequence_parallel
    # The compiler gathers the same array once: what both branches read, or all layers.
    is_parallel = group.is_parallel_to_attention or group.joins_attention
    shares_input = (
        group.shares_norm
        or group.joins_attention
        or group.shares_input
        or group.is_input_detached
    )

    # Inputs, and their gradients: partial sums over the axes that split outputs.
    has_input_gradient = not group.is_input_detached
    if is_latent and has_input_gradient:
        axes = tuple(sorted(output_axes))
        yield from send("its gradient", "all-reduce", axes, 0, backward)
    if group.input_features == "memory":
        # An encoder's output is the same in all layers: gathered once a pass.
        once = shape.stage_passes_with_bubble
        yield from send("input", "all-gather", sequence_axes, once, 0)
    if group.input_features == "residual" and not shares_input:
        yield from send("input", "all-gather", sequence_axes, forward, backward)
    if group.input_features in ("residual", "memory") and has_input_gradient:
        other_axes = _without(sorted(output_axes), sequence_axes)
        yield from send("its gradient", "reduce-scatter", sequence_axes, 0, backward)
        yield from send("its gradient", "all-reduce", other_axes, 0, backward)

    # Outputs: partial sums over the axes that split inputs; and their gradients.
    if group.output_features == "latent" and input_axes:
        again = backward if shape.remat != "none" else 0
        yield from _in_both_passes(
            f"{group.name}: output",
            "all-reduce",
            tuple(sorted(input_axes)),
            tokens * work.dtype_bytes * group.latent_width,
            _Runs(forward, again),
        )
    if group.output_features == "residual":
        other_axes = _without(sorted(input_axes), sequence_axes)
        recomputes = shape.remat != "none" and work.backward_needs_branch_output(group)
        again = backward if recomputes else 0
        # A parallel branch has attention's gradient, which is gathered there.
        gathers = 0 if is_parallel else backward
        yield from send("output", "reduce-scatter", sequence_axes, forward, again)
        yield from send("its gradient", "all-gather", sequence_axes, 0, gathers)
        yield from send("output", "all-reduce", other_axes, forward, again)


def _mesh_axes(rules: AxisRules, logical_axes: Iterable[str | None]) -> set[str]:
    return {axis for logical in logical_axes for axis in rules.mesh_axes(logical)}


def _list_weight_collectives(
    shape: StepShape, kernel: Kernel, passes: _Runs, token_axes: MeshAxes
) -> Iterator[PlannedCollective]:
    """Lists gathers of a kernel from storage, and reductions of its gradient into it.

    Under ZeRO-2 kernels are at hand whole, and gradients go to shares of their own; but
    experts', and all of a 1F1B pipeline, are gathered from such shares too.
    """
    split = shape.split
    # 1.0 or 0.0, of each candidate.
    is_gathered: Number = 1.0
    is_zero_2 = split.gradients != split.storage
    if is_zero_2 and "expert" not in kernel.axes:
        is_gathered = np.where(shape.pipelined & shape.one_f_one_b, 1.0, 0.0)
    backward_gathers = is_gathered * passes.backward if kernel.is_scanned else 0
    gathers = _Runs(is_gathered * passes.forward, backward_gathers)
    yield from _in_both_passes(
        kernel.name,
        "all-gather",
        split.gather_axes(split.gradients, kernel),
        shape.gathered_weight_bytes(kernel),
        gathers,
        waits=False,
    )
    if kernel.is_trained:
        yield from _list_gradient_collectives(
            shape, kernel, passes.backward, token_axes
        )


def _list_gradient_collectives(
    shape: StepShape, kernel: Kernel, runs: Number, token_axes: MeshAxes
) -> Iterator[PlannedCollective]:
    """Lists reductions of a kernel's gradient into its shares and over the axes that
    split the tokens."""
    split = shape.split
    content = f"{kernel.name}: gradient"
    whole_bytes = shape.gathered_weight_bytes(kernel)
    scattered_axes = split.gather_axes(split.gradients, kernel)
    yield PlannedCollective(
        content,
        "reduce-scatter",
        scattered_axes,
        whole_bytes,
        runs,
        "backward",
        waits=False,
    )
    # The share that is left is summed over the other axes of tokens.
    other_axes = _without(token_axes, scattered_axes)
    share_bytes = whole_bytes / split.num_devices(scattered_axes)
    yield PlannedCollective(
        content, "all-reduce", other_axes, share_bytes, runs, "backward", waits=False
    )


def _list_attention_collectives(
    shape: StepShape, attention: AttentionShape, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists those of a sequence split over devices, and of kv heads that are whole on
    several."""
    work = shape.work
    split = shape.split
    rules = split.compute
    heads = attention.heads
    method = work.config.parallel.context
    if method == "all_gather":
        yield from _list_gathered_context(shape, attention, passes)
    elif method == "ring":
        yield from _list_ring_context(shape, attention, passes)
    else:
        yield from _list_ulysses_context(shape, attention, passes)
    if heads.shared_key_dim:
        # A part of the keys that all heads share: each device has its heads' sum.
        tokens = shape.micro_batch_tokens * attention.token_ratio
        yield PlannedCollective(
            "attention: shared keys' gradient",
            "all-reduce",
            rules.heads,
            tokens * heads.shared_key_dim * work.dtype_bytes,
            passes.backward,
            "backward",
        )
    if heads.index_dim:
        # Its loss compares its scores with the mean of all heads' weights, which a
        # tile's backward pass makes again.
        scores = shape.micro_batch_tokens * attention.token_ratio * attention.key_len
        yield from _in_both_passes(
            "indexer: mean weights of heads",
            "all-reduce",
            rules.heads,
            scores * FP32,
            passes,
        )
    if rules.heads and not rules.mesh_axes(heads.kv_axis):
        # Every device has all kv heads, and the sum over its query heads.
        # What blocks add up is in fp32; attention of a whole sequence gives its own
        # dtype.
        is_sequence_split = np.greater(split.num_devices(rules.seq), 1)
        adds_blocks = is_sequence_split & (method != "ulysses")
        itemsize = np.where(adds_blocks, FP32, work.dtype_bytes)
        kv_elements = _count_kv_elements_per_head(shape, attention) * heads.num_kv_heads
        # Elements are counted for tokens of queries; keys may be more or fewer.
        gradient_bytes = kv_elements * itemsize * attention.key_len
        gradient_bytes = gradient_bytes / attention.query_len
        yield PlannedCollective(
            "whole kv heads: gradients",
            "all-reduce",
            rules.heads,
            gradient_bytes,
            2 * passes.backward,  # of keys and of values
            "backward",
        )


_KEYS_AND_VALUES = "attention: keys and values"


def _count_kv_elements_per_head(shape: StepShape, attention: AttentionShape) -> Number:
    """Counts elements of a head's keys or of its values, on average, in a device's part
    of the sequence; two such arrays are sent. Of a query and its output likewise."""
    heads = attention.heads
    tokens = shape.micro_batch_tokens * attention.token_ratio
    key_and_value_dims = heads.head_dim + heads.value_dim
    return tokens * key_and_value_dims / 2


def _count_read_kv_heads(shape: StepShape, attention: AttentionShape) -> Number:
    """Counts the kv heads that the query heads of one device read: the others are not
    sent."""
    split = shape.split
    kv_axes = split.compute.mesh_axes(attention.heads.kv_axis)
    kv_ways = split.num_devices(kv_axes)
    head_ways = split.num_devices(split.compute.heads)
    kv_heads_here = attention.heads.num_kv_heads / kv_ways
    # Query heads are split into as many parts or more: a part reads its share of the kv
    # heads, one at least.
    kv_heads_of_part = np.maximum(kv_heads_here * kv_ways / head_ways, 1)
    return np.minimum(kv_heads_here, kv_heads_of_part)


def _list_gathered_context(
    shape: StepShape, attention: AttentionShape, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists all-gathers of keys and values, of the whole sequence on each device, and
    the reductions of their gradients."""
    axes = shape.split.compute.seq
    kv_heads = _count_read_kv_heads(shape, attention)
    elements_here = _count_kv_elements_per_head(shape, attention) * kv_heads
    whole_elements = elements_here * shape.split.num_devices(axes)
    # Twice a pass: keys, and values.
    yield from _in_both_passes(
        _KEYS_AND_VALUES,
        "all-gather",
        axes,
        whole_elements * shape.work.dtype_bytes,
        _Runs(2 * passes.forward, 2 * passes.backward),
    )
    yield from _in_both_passes(
        "attention: their gradients",
        "reduce-scatter",
        axes,
        whole_elements * FP32,
        _Runs(0, 2 * passes.backward),
    )


def _list_ring_context(
    shape: StepShape, attention: AttentionShape, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists permutes of blocks of keys and values, passed from device to device (Liu et
    al. 2023, arXiv 2310.01889), and of their gradients."""
    work = shape.work
    axes = shape.split.compute.seq
    ring_size = shape.split.num_devices(axes)
    kv_heads = _count_read_kv_heads(shape, attention)
    block_elements = _count_kv_elements_per_head(shape, attention) * kv_heads
    # A balanced sequence has early tokens everywhere: no step of the ring can be left
    # out for a window.
    window = None
    if not work.config.parallel.balance_sequence:
        window = limit_window(attention.window, attention.heads.chunk)
    tokens_here = attention.query_len / ring_size
    # Two permutes a step: keys, and values.
    permutes = 2 * count_ring_steps(ring_size, tokens_here, window)
    recomputes = work.is_attention_recomputed(shape.remat)
    again = passes.backward if recomputes else 0
    yield from _in_both_passes(
        _KEYS_AND_VALUES,
        "collective-permute",
        axes,
        block_elements * work.dtype_bytes,
        _Runs(permutes * passes.forward, permutes * (passes.backward + again)),
    )
    # Gradients travel with their blocks, and a last step home.
    gradient_permutes = np.where(np.greater(permutes, 0), permutes + 2, 0)
    yield from _in_both_passes(
        "attention: their gradients",
        "collective-permute",
        axes,
        block_elements * FP32,
        _Runs(0, gradient_permutes * passes.backward),
    )


def _list_ulysses_context(
    shape: StepShape, attention: AttentionShape, passes: _Runs
) -> Iterator[PlannedCollective]:
    """Lists exchanges of parts of the sequence for parts of the heads (Jacobs et al.
    2023, arXiv 2309.14509)."""
    work = shape.work
    split = shape.split
    axes = split.compute.seq
    ways = split.num_devices(axes)
    heads = attention.heads
    forward, backward = passes
    again = backward if work.is_attention_recomputed(shape.remat) else 0

    # Bytes of the keys that a device sends, or of the values, on average.
    kv_heads = _count_read_kv_heads(shape, attention)
    # Where devices do not divide the kv heads, each head goes to several of them.
    whole_kv_heads = np.asarray(np.maximum(kv_heads, 1), int)
    copies = ways / np.gcd(whole_kv_heads, np.asarray(ways, int))
    kv_elements = _count_kv_elements_per_head(shape, attention) * kv_heads * copies
    kv_bytes = kv_elements * work.dtype_bytes
    # Several devices' gradients of one head are added up in fp32.
    gradient_itemsize = np.where(np.greater(copies, 1), FP32, work.dtype_bytes)
    kv_gradient_bytes = kv_elements * gradient_itemsize

    # Bytes of queries and output of the heads that a device has.
    tokens = shape.micro_batch_tokens * attention.token_ratio
    query_heads = heads.num_heads / split.num_devices(split.compute.heads)
    query_bytes = tokens * heads.head_dim * query_heads * work.dtype_bytes
    output_bytes = tokens * heads.value_dim * query_heads * work.dtype_bytes
    # Of a query's gradient, or of an output's, on average.
    query_gradient_bytes = (query_bytes + output_bytes) / 2

    def exchange(
        content: str, size: Number, forward_runs: Number, backward_runs: Number
    ) -> Iterator[PlannedCollective]:
        runs = _Runs(forward_runs, backward_runs)
        return _in_both_passes(content, "all-to-all", axes, size, runs)

    yield from exchange("attention: queries", query_bytes, forward, backward)
    yield from exchange(_KEYS_AND_VALUES, kv_bytes, 2 * forward, 2 * backward)
    yield from exchange("attention: output", output_bytes, forward + again, 0)
    yield from exchange("attention: gradients", query_gradient_bytes, 0, 2 * backward)
    yield from exchange(
        "attention: gradients of keys and values", kv_gradient_bytes, 0, 2 * backward
    )


def _list_expert_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists those of experts' weights, of routers, of rows sent to experts and back,
    and of the arrays around them."""
    work = shape.work
    split = shape.split
    rules = split.compute
    experts = work.experts
    router = work.router
    if experts is None or router is None:
        return
    groups = [group for group in work.matmul_layer_counts if group.has_experts]
    passes = _count_layer_passes(shape, work.num_expert_layers)
    forward, backward = passes

    # Axes of tokens that experts are not split over: over these a kernel's gradient is
    # a partial sum.
    token_axes = _without((*rules.batch, *rules.seq), rules.expert)
    for group in groups:
        for kernel in group.kernels:
            yield from _list_weight_collectives(shape, kernel, passes, token_axes)
    for stack in work.stacks:
        for name, spec in stack.base_specs.items():
            if "expert" not in spec.axes or spec.role == "matrix":
                continue  # kernels are counted above
            offsets = make_kernel(name, spec, work.trained_names)
            layer_passes = _count_layer_passes(shape, stack.num_layers)
            yield from _list_weight_collectives(
                shape, offsets, layer_passes, token_axes
            )
    router_axes = split.gather_axes(split.storage, router)
    router_bytes = router.size * FP32
    yield from _in_both_passes(
        "router", "all-gather", router_axes, router_bytes, passes, waits=False
    )
    yield PlannedCollective(
        "router: gradient",
        "all-reduce",
        (*rules.batch, *rules.residual),
        router_bytes,
        backward,
        "backward",
        waits=False,
    )

    def send(
        content: str,
        kind: str,
        axes: MeshAxes,
        size: Number,
        forward_runs: Number,
        backward_runs: Number,
    ) -> Iterator[PlannedCollective]:
        runs = _Runs(forward_runs, backward_runs)
        return _in_both_passes(f"experts: {content}", kind, axes, size, runs)

    # Rows of tokens, to their experts' devices and back.
    token_bytes = (experts.input_dim or work.config.model.d_model) * work.dtype_bytes
    exchange = "all-to-all"
    rows = shape.expert_buffer_rows
    if shape.ragged and experts.capacity_factor is None:
        # As many rows as there are, in place of buffers for the worst case.
        exchange = "ragged-all-to-all"
        rows = shape.micro_batch_tokens * experts.experts_per_token
    row_bytes = rows * token_bytes
    needs_output = any(work.backward_needs_branch_output(group) for group in groups)
    input_again = backward if shape.remat != "none" else 0
    output_again = input_again if needs_output else 0
    expert_axes = rules.expert
    yield from send(
        "rows there", exchange, expert_axes, row_bytes, forward, input_again
    )
    yield from send(
        "rows back", exchange, expert_axes, row_bytes, forward, output_again
    )
    yield from send("gradients there", exchange, expert_axes, row_bytes, 0, backward)
    yield from send("gradients back", exchange, expert_axes, row_bytes, 0, backward)

    # The arrays around experts, as around any FFN (_list_matmul_collectives). Shared
    # experts gather the same arrays, and so does attention beside; the compiler gathers
    # them once.
    sequence_axes = split.sequence_parallel
    is_parallel = any(group.is_parallel_to_attention for group in groups)
    shares_input = any(group.shares_norm for group in groups)
    has_latent = experts.input_dim is not None
    gathers_alone = not experts.has_shared or has_latent
    gathers_input = has_latent or (gathers_alone and not shares_input)
    gathers_gradient = has_latent or (gathers_alone and not is_parallel)
    input_axes = sequence_axes if gathers_input else ()
    gradient_axes = sequence_axes if gathers_gradient else ()
    # A hidden layer that is split leaves partial sums.
    other_axes = _without(rules.mlp, sequence_axes)
    stream_bytes = shape.micro_batch_tokens * token_bytes
    output_runs = backward + output_again
    yield from send(
        "output", "reduce-scatter", sequence_axes, stream_bytes, forward, output_runs
    )
    yield from send(
        "output", "all-reduce", other_axes, stream_bytes, forward, output_runs
    )
    yield from send("input", "all-gather", input_axes, stream_bytes, forward, backward)
    yield from send(
        "output's gradient", "all-gather", gradient_axes, stream_bytes, 0, backward
    )


def _list_outer_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists those of the embedding, learned positions, matrices outside the layers and
    the loss."""
    yield from _list_loss_collectives(shape)
    work = shape.work
    rules = shape.split.compute
    runs = _Runs(shape.loss_calls, shape.loss_calls)
    token_axes = (*rules.batch, *rules.residual, *_stage_axes(shape))
    for kernel in work.non_layer_kernels:
        yield from _list_weight_collectives(shape, kernel, runs, token_axes)
    if work.frontend is not None:
        # A row's items are whole where its sequence is split.
        for kernel in work.frontend.kernels:
            yield from _list_weight_collectives(shape, kernel, runs, rules.batch)
    token_table = next(iter(work.embedding_lookup_rates))
    for name, spec in work.base_specs.items():
        if name not in work.embedding_lookup_rates:
            continue
        table = Kernel(
            name=name.removesuffix(".table"),
            shape=spec.shape,
            axes=spec.axes,
            num_input_dims=1,
            is_trained=name in work.trained_base_names,
        )
        for rate in work.embedding_lookup_rates[name]:
            yield from _list_lookup_collectives(
                shape, table, rate, is_token_table=name == token_table
            )


def _list_loss_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    work = shape.work
    rules = shape.split.compute
    runs = shape.loss_calls * work.head_passes
    # The head is gathered once: loss and gradient are computed in the same pass
    # (parallel/cross_entropy.py).
    no_token_axes = ()
    gathers = _Runs(runs, 0 * runs)
    yield from _list_weight_collectives(shape, work.head, gathers, no_token_axes)
    if work.head.is_trained:
        token_axes = (*rules.batch, *rules.residual, *_stage_axes(shape))
        # Devices with other parts of the vocabulary have other parts of the gradient.
        summed_axes = _without(token_axes, rules.vocab)
        yield from _list_gradient_collectives(shape, work.head, runs, summed_axes)

    # Axes that split both tokens and vocabulary: each device needs all of their tokens
    # for its part of the vocabulary.
    sequence_axes = shape.split.sequence_parallel
    shared_axes = tuple(axis for axis in sequence_axes if axis in rules.vocab)
    other_axes = _without(rules.vocab, sequence_axes)
    hidden_width = work.config.model.d_model
    hidden_bytes = shape.embedding_loss_tokens * hidden_width * work.dtype_bytes
    yield PlannedCollective(
        "loss: hidden states", "all-gather", shared_axes, hidden_bytes, runs, "backward"
    )
    content = "loss: their gradient"
    yield PlannedCollective(
        content, "reduce-scatter", shared_axes, hidden_bytes, runs, "backward"
    )
    yield PlannedCollective(
        content, "all-reduce", other_axes, hidden_bytes, runs, "backward"
    )


def _list_lookup_collectives(
    shape: StepShape, table: Kernel, rate: float, *, is_token_table: bool
) -> Iterator[PlannedCollective]:
    """Lists those of looking up rows of a table (``parallel/embedding.py``).

    Columns of a table in storage are exchanged for tokens; rows split over the
    vocabulary are partial sums, and what splits the residual stream further is
    scattered.

    Args:
        rate: tokens that are looked up for each of the batch.
        is_token_table: whether it is the embedding of tokens, not of positions.
    """
    work = shape.work
    split = shape.split
    rules = split.compute
    runs = shape.embedding_calls
    vocab_axes = rules.mesh_axes(table.axes[0])
    sequence_axes = split.sequence_parallel
    token_axes = (*rules.batch, *rules.seq)
    # Axes that split the table's columns in storage, and tokens in use.
    stored_axes = split.gather_axes(split.gradients, table)
    exchanged_axes = tuple(axis for axis in stored_axes if axis in token_axes)
    summed_axes = _without(vocab_axes, sequence_axes)

    tokens = shape.embedding_loss_tokens * rate
    rows_bytes = tokens * table.shape[-1] * work.dtype_bytes
    rows_share_bytes = rows_bytes / split.num_devices(sequence_axes)
    content = f"{table.name}: rows"
    yield PlannedCollective(
        content, "all-to-all", exchanged_axes, rows_share_bytes, runs, "forward"
    )
    yield PlannedCollective(
        content, "reduce-scatter", sequence_axes, rows_bytes, runs, "forward"
    )
    yield PlannedCollective(
        content, "all-reduce", summed_axes, rows_bytes, runs, "forward"
    )

    if not table.is_trained:
        return
    content = f"{table.name}: gradient"
    num_shards = split.num_shards(split.gradients, table.axes)
    table_share_bytes = table.size * work.dtype_bytes / num_shards
    all_token_axes = (*token_axes, *_stage_axes(shape))
    reduced_axes = _without(all_token_axes, (*exchanged_axes, *vocab_axes))
    yield PlannedCollective(
        content,
        "all-reduce",
        reduced_axes,
        table_share_bytes,
        runs,
        "backward",
        waits=False,
    )
    # Once for all tables: rows of each are added up, and have the same gradient.
    if is_token_table:
        yield PlannedCollective(
            content, "all-to-all", exchanged_axes, rows_share_bytes, runs, "backward"
        )
        yield PlannedCollective(
            content, "all-gather", sequence_axes, rows_bytes, runs, "backward"
        )


def _stage_axes(shape: StepShape) -> MeshAxes:
    """Returns the mesh axes of a pipeline over which tokens lie spread before its
    layers and after."""
    return () if shape.one_f_one_b else shape.split.compute.layers


def _list_pipeline_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists activations to the next stage and gradients to the one before, a turn; a
    circular pipeline carries inputs and results as well."""
    work = shape.work
    split = shape.split
    axes = split.compute.layers
    stream_width = work.config.model.d_model
    stream_bytes = shape.residual_tokens * stream_width * work.dtype_bytes
    # Other schedules carry inputs and results as well.
    arrays_per_turn = 1 if shape.one_f_one_b else 3
    runs = arrays_per_turn * shape.pipeline_iterations
    permute = "collective-permute"
    yield PlannedCollective(
        "pipeline: to the next stage", permute, axes, stream_bytes, runs, "forward"
    )
    yield PlannedCollective(
        "pipeline: to the one before", permute, axes, stream_bytes, runs, "backward"
    )
    if shape.one_f_one_b:
        # Each stage computes the ends' gradients of its own micro-batches.
        end_bytes = split.local_bytes(split.gradients, work.non_layer_specs.values())
        yield PlannedCollective(
            "ends: gradients", "all-reduce", axes, end_bytes, 1.0, "once"
        )


def _list_update_collectives(shape: StepShape) -> Iterator[PlannedCollective]:
    """Lists gathers of updates where moments lie in smaller shares than parameters
    (ZeRO-1, 2)."""
    work = shape.work
    split = shape.split
    if split.optimizer == split.storage:
        return
    for name, spec in work.specs.items():
        if name not in work.trained_names:
            continue
        moment_axes: dict[str, None] = {}  # an ordered set
        for logical in spec.axes:
            moment_axes |= dict.fromkeys(split.optimizer.mesh_axes(logical))
        # Moments' shards are gathered into the parameter's.
        stored_axes = _mesh_axes(split.storage, spec.axes)
        gathered_axes = _without(moment_axes, stored_axes)
        whole_bytes = split.local_bytes(split.storage, [spec])
        content = f"{name.partition('.kernel')[0]}: update"
        yield PlannedCollective(
            content, "all-gather", gathered_axes, whole_bytes, 1.0, "once"
        )
