"""Estimates a step's time: a roofline with three constants a family of chips.

Matrix products run at a share of the peak, everything else that touches memory at a
share of its bandwidth, and communication beside them where it can. Per micro-batch,
forward and backward apart, in seconds:

    products     FLOPs / (peak · matmul)
    attention    its FLOPs likewise, and its scores' element-wise work: on the vector units, or
                 through memory where no kernel keeps them on the chip
    traffic      bytes of element-wise maps, of parameters and the optimizer's state / bandwidth;
                 on a CPU also a step's memory, which the system hands out page by page
    exposed      communication − min(hidden · communication, computation to run beside it)

A pipeline's idle turns take as long as its others
(``StepShape.stage_passes_with_bubble``).

A :data:`~maxlm.plan.workload.Number` is a float, or an array with an element for each
mesh that a search compares. Hence ``np.where`` and ``np.minimum`` instead of ``if`` and
``min`` on what depends on the mesh.

The constants (``EFFICIENCY``) are fitted to published runs by
``benchmarks/plan_mfu.py``, for all rows of a family together; a CPU's to runs here
(``benchmarks/plan_cpu.py``).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from maxlm.optim.kinds import get_input_output_dims
from maxlm.parallel.terms import limit_window
from maxlm.plan.communication import list_collectives
from maxlm.plan.hardware import Chip
from maxlm.plan.layout import count_training_flops_per_token
from maxlm.plan.memory import count_stated_elements, count_stored_bytes
from maxlm.plan.network import Network, Phase, PlannedCollective
from maxlm.plan.stacks import AttentionShape, StackCosts
from maxlm.plan.workload import FP32, Number, StepShape

# Vector operations for each score of attention: softmax and masks, forward; their
# gradients and the softmax again, backward. From the static schedules of the best
# published TPU kernels at head size 128: 138 µs forward and 393 µs backward on a v5p,
# 161 and 277 µs on a v6e, for 67 M scores, less the products' time.
_FORWARD_OPS_PER_SCORE = 12.0
_BACKWARD_OPS_PER_SCORE = 20.0
# Reads and writes of fp32 scores in memory where no kernel keeps them on the chip.
_FORWARD_SCORE_PASSES = 4.0
_BACKWARD_SCORE_PASSES = 8.0
# Passes over the residual stream of a layer's norms and additions: two for a norm, two
# for adding a branch, three for adding two branches at once.
_NORM = 2
_ADD_BRANCH = 2
_ADD_TWO_BRANCHES = 3
_STREAM_PASSES = {
    "pre": 2 * _NORM + 2 * _ADD_BRANCH,
    "post": 2 * _NORM + 2 * _ADD_BRANCH,
    "sandwich": 4 * _NORM + 2 * _ADD_BRANCH,
    "output": 2 * _NORM + 2 * _ADD_BRANCH,
    "normed": 2 * _NORM + 2 * _ADD_BRANCH,
    "parallel": 2 * _NORM + _ADD_TWO_BRANCHES,
    "parallel_shared": _NORM + _ADD_TWO_BRANCHES,
}
# Of a layer with one branch alone.
_ONE_BRANCH_PASSES = {
    "pre": _NORM + _ADD_BRANCH,
    "post": _NORM + _ADD_BRANCH,
    "sandwich": 2 * _NORM + _ADD_BRANCH,
    "output": _NORM + _ADD_BRANCH,
    "normed": _NORM + _ADD_BRANCH,
    "parallel": _NORM + _ADD_BRANCH,
    "parallel_shared": _NORM + _ADD_BRANCH,
}
_CROSS_ATTENTION_PASSES = _NORM + _ADD_BRANCH
# A map that changes each element alone reads and writes it.
_READ_AND_WRITE = 2
# Blocks up to this size, in bytes, the C library keeps for the next step (glibc's
# DEFAULT_MMAP_THRESHOLD_MAX).
_REUSED_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Efficiency:
    """Shares of a machine's rates that programs reach."""

    matmul: float
    """Share of the peak in large matrix products."""
    hidden: float
    """Share of communication that computation hides."""
    network: float
    """Share of the links' rates in collectives."""
    memory: float = 0.8
    """Share of the memory's bandwidth in element-wise maps."""


EFFICIENCY = {
    "tpu": Efficiency(matmul=0.82, hidden=0.65, network=0.63),
    "nvidia": Efficiency(matmul=0.53, hidden=0.56, network=0.54),
    # Copies and transpositions between products, which other compilers fuse, are in
    # ``memory``.
    "cpu": Efficiency(matmul=0.79, hidden=0.0, network=1.0, memory=0.4),
}


class DecodeEfficiency(NamedTuple):
    """Shares of a machine's rates that decoding reaches, by
    ``benchmarks/plan_serving.py``."""

    reading: float
    """Share of the memory's bandwidth in reading weights and caches."""
    step_seconds: float
    """Seconds of a step that no device's work accounts for."""


DECODE_EFFICIENCY = {
    "tpu": DecodeEfficiency(reading=0.62, step_seconds=2e-3),
    "nvidia": DecodeEfficiency(reading=0.85, step_seconds=1e-3),
    "cpu": DecodeEfficiency(reading=0.85, step_seconds=1e-3),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the busiest device."""

    products: Number
    """Matrix products, recomputed ones included."""
    attention: Number
    """Attention's products, and its scores' element-wise work."""
    traffic: Number
    """Other element-wise work, by the bytes it moves; recurrences."""
    exposed: Number
    """Communication that nothing hides."""
    idle: Number
    """A pipeline's turns without work."""
    communication: Number
    """All communication, hidden or not; no part of the total."""
    forward: Number
    """The part of products, attention and traffic in forward passes."""

    def plus(self, other: "StepTime") -> "StepTime":
        """Returns the time of both, one after the other."""
        sums = {
            part.name: getattr(self, part.name) + getattr(other, part.name)
            for part in fields(self)
        }
        return StepTime(**sums)

    @property
    def total(self) -> Number:
        return self.products + self.attention + self.traffic + self.exposed + self.idle


@dataclass(frozen=True)
class DeviceFlops:
    """FLOPs of a device, recomputation included: of its layers for one micro-batch, of
    the loss for all micro-batches of a step."""

    forward: Number
    """Matrix products of the layers; attention's are counted apart."""
    backward: Number
    attention_forward: Number
    """Products of queries and keys, and of weights and values."""
    attention_backward: Number
    loss: Number
    """Forward FLOPs of the loss."""
    loss_backward: Number


class _PassFlops(NamedTuple):
    """FLOPs of a device in the two passes of one micro-batch."""

    forward: Number
    backward: Number


def _add_up(parts: Iterable[_PassFlops]) -> _PassFlops:
    forward = backward = 0.0
    for part in parts:
        forward += part.forward
        backward += part.backward
    return _PassFlops(forward, backward)


def count_device_flops(shape: StepShape) -> DeviceFlops:
    """Counts what a device computes: its layers for one micro-batch, the loss for
    all."""
    parts = [*_list_matmul_flops(shape), *_list_adapter_flops(shape)]
    if shape.work.router is not None:
        parts.append(_count_router_flops(shape))
    layers = _add_up(parts)
    attention = _count_attention_flops(shape)
    loss = _count_loss_flops(shape)
    # A pipeline's backward pass runs its layers forward once more.
    forward_again = np.where(shape.pipelined, layers.forward, 0.0)
    scores_again = shape.score_recomputes * attention.forward
    return DeviceFlops(
        forward=layers.forward,
        backward=layers.backward + forward_again,
        attention_forward=attention.forward,
        attention_backward=attention.backward + scores_again,
        loss=loss.forward,
        loss_backward=loss.backward,
    )


def _list_matmul_flops(shape: StepShape) -> Iterator[_PassFlops]:
    """Yields FLOPs of each of the layers' matrices [K, N]: forward 2·K·N for each
    token; backward as many for the gradient of its input, for its own if it is trained,
    and for its output if that is computed again."""
    work = shape.work
    split = shape.split
    for group, num_layers in work.matmul_layer_counts.items():
        # The share of a group's experts that multiply a token.
        active_share = 1.0
        if group.has_experts and work.experts is not None:
            active_share = shape.expert_rows_per_token / work.experts.num_experts
        # Tokens times layers: a stage holds its share of the layers.
        tokens = shape.per_stage(num_layers) * group.token_ratio
        if work.is_in_stream_layout(group):
            tokens *= shape.residual_tokens
        else:
            tokens *= shape.micro_batch_tokens
        # Without remat all else is kept, but experts' hidden activations never are.
        remakes_hidden = (
            group.has_experts
            and shape.remat == "none"
            and group.output_features == "mlp"
        )
        for kernel in group.kernels:
            # Rows go to their experts: over `expert` a device has as many as it had
            # tokens.
            axes = tuple(axis for axis in kernel.axes if axis != "expert")
            num_shards = split.num_shards(split.compute, axes)
            forward = 2 * kernel.size * active_share * tokens / num_shards
            is_recomputed = work.is_kernel_recomputed(group, kernel, shape.remat)
            has_input_gradient = not group.is_input_detached
            backward_products = int(has_input_gradient) + int(kernel.is_trained)
            backward_products += int(is_recomputed)
            yield _PassFlops(forward, forward * backward_products)
            if remakes_hidden:
                yield _PassFlops(0.0, forward)


def _list_adapter_flops(shape: StepShape) -> Iterator[_PassFlops]:
    """Yields FLOPs of each matrix that an adapter adds; all are trained."""
    split = shape.split
    is_recomputed = shape.remat != "none"
    # The gradients of its input and its own.
    backward_products = 2 + int(is_recomputed)
    for stack in shape.work.stacks:
        layers = shape.per_stage(stack.num_layers) * stack.token_ratio
        for kernel in stack.adapter_kernels:
            writes_stream = "embed" in kernel.axes[kernel.num_input_dims :]
            tokens = shape.micro_batch_tokens
            if writes_stream:
                tokens = shape.residual_tokens
            num_shards = split.num_shards(split.compute, kernel.axes)
            forward = 2 * layers * tokens * kernel.size / num_shards
            yield _PassFlops(forward, forward * backward_products)


def _count_router_flops(shape: StepShape) -> _PassFlops:
    work = shape.work
    router = work.router
    assert router is not None
    tokens = shape.per_stage(work.num_expert_layers) * shape.residual_tokens
    forward = 2 * router.size * tokens
    is_recomputed = shape.remat != "none"
    backward_products = 1 + int(router.is_trained) + int(is_recomputed)
    return _PassFlops(forward, forward * backward_products)


def _count_attention_flops(shape: StepShape) -> _PassFlops:
    """Counts attention's products, without what the backward pass computes again."""
    forward = backward = 0.0
    for attention, num_layers in shape.work.attention_layer_counts.items():
        scores = _count_scores(shape, attention, num_layers)
        key_dim = attention.heads.head_dim
        value_dim = attention.heads.value_dim
        forward += 2 * scores * (key_dim + value_dim)
        # Scores, and gradients of weights, queries, keys and values.
        backward += 2 * scores * (3 * key_dim + 2 * value_dim)
        # An indexer's scores, which each device that shares heads computes alike, in
        # the backward pass again, and gradients of its queries and keys.
        head_ways = shape.split.num_devices(shape.split.compute.heads)
        pairs = scores * head_ways / attention.heads.num_heads
        forward += 2 * pairs * attention.heads.index_dim
        backward += 6 * pairs * attention.heads.index_dim
    return _PassFlops(forward, backward)


def _count_loss_flops(shape: StepShape) -> _PassFlops:
    """Counts the products of the head, of other matrices behind the layers and of a
    frontend."""
    work = shape.work
    split = shape.split
    # The head maps all the loss's tokens on a device, the others those that the device
    # has of the residual stream.
    tokens_of_kernel = {work.head: shape.embedding_loss_tokens}
    for kernel in work.non_layer_kernels:
        tokens_of_kernel[kernel] = shape.embedding_loss_residual_tokens
    parts = []
    for kernel, tokens in tokens_of_kernel.items():
        if kernel is work.head:
            tokens = tokens * work.head_passes
        num_shards = split.num_shards(split.compute, kernel.axes)
        forward = 2 * shape.loss_calls * tokens * kernel.size / num_shards
        backward_products = 1 + int(kernel.is_trained)
        parts.append(_PassFlops(forward, forward * backward_products))
    parts += _list_frontend_flops(shape)
    return _add_up(parts)


def _list_frontend_flops(shape: StepShape) -> Iterator[_PassFlops]:
    """Yields FLOPs of a frontend, of all micro-batches of a step, by matrix."""
    frontend = shape.work.frontend
    if frontend is None:
        return
    rows = shape.micro_batches * shape.count_frontend_rows()
    for kernel in frontend.kernels:
        num_shards = shape.split.num_shards(shape.split.compute, kernel.axes)
        forward = 2 * rows * kernel.size / num_shards
        backward_products = 1 + int(kernel.is_trained)
        yield _PassFlops(forward, forward * backward_products)
    num_rows = shape.micro_batches * shape.micro_batch_size
    tokens = num_rows * shape.work.tokens_per_row.decoder
    extra = tokens * frontend.extra_flops_per_token
    yield _PassFlops(extra, 2 * extra)


def count_attention_scores(shape: StepShape, *, fused: bool) -> Number:
    """Counts scores of attention on a device in one pass of its layers, as far as they
    are computed: those that a kernel keeps on the chip, or the others."""
    total = 0.0
    for attention, num_layers in shape.work.attention_layer_counts.items():
        on_xla = attention.has_biases or attention.heads.index_dim > 0
        is_fused = shape.fused_attention and not on_xla
        if is_fused == fused:
            total += _count_scores(shape, attention, num_layers)
    return total


def _count_scores(
    shape: StepShape, attention: AttentionShape, num_layers: int
) -> Number:
    keys = num_layers * attention.token_ratio * attention.key_len
    keys = keys * get_computed_score_ratio(attention)
    head_ways = shape.split.num_devices(shape.split.compute.heads)
    heads = attention.heads.num_heads / head_ways
    return shape.per_stage(keys) * shape.micro_batch_tokens * heads


class StatedFlops(NamedTuple):
    """FLOPs of a device, as layers state them, in the two passes of one micro-batch."""

    forward: Number
    backward: Number


def count_extra_forward_flops(shape: StepShape) -> Number:
    """Counts a device's forward FLOPs beside products and attention in one pass of its
    layers."""
    return _count_stated_flops(shape, "extra_flops")


def _count_stated_flops(
    shape: StepShape, name: Literal["extra_flops", "product_flops"]
) -> Number:
    """Counts a device's forward FLOPs of a field of
    :class:`~maxlm.models.costs.LayerCosts`, in one pass of its layers."""
    split = shape.split
    flops = 0.0
    for stack in shape.work.stacks:
        layers = shape.per_stage(stack.num_layers)
        tokens = layers * stack.token_ratio * shape.micro_batch_tokens
        for branch in stack.branches:
            stated = getattr(branch.costs, name)
            if stated:
                num_shards = split.num_shards(split.compute, branch.costs.flops_axes)
                flops += stated * tokens / num_shards
    return flops


def count_recurrence_products(shape: StepShape) -> StatedFlops:
    """Counts a device's FLOPs of matrix products within recurrences, in both passes of
    one micro-batch: the backward pass computes chunks again, whatever is kept, and two
    products for each of theirs."""
    forward = _count_stated_flops(shape, "product_flops")
    chunks_again = 1 + shape.score_recomputes
    return StatedFlops(forward, forward * (2 + chunks_again))


class _ExtraSeconds(NamedTuple):
    """Seconds of what layers compute beside products and attention, in the two passes
    of one micro-batch."""

    forward: Number
    backward: Number


def _estimate_extra_seconds(
    shape: StepShape, chip: Chip, matmul_rate: Number
) -> _ExtraSeconds:
    """Estimates the seconds of what layers compute beside products and attention: on
    the vector units, but for matrix products in fp32, which a TPU's and a GPU's kernels
    compute as three in bf16 (``pallas_kernels/linear_recurrence``).

    Args:
        matmul_rate: FLOP/s of matrix products in bf16; on a CPU in fp32.
    """
    products = count_recurrence_products(shape)
    others = count_extra_forward_flops(shape) - products.forward
    products_a_product = 1 if chip.family == "cpu" else 3
    product_rate = matmul_rate / products_a_product
    other_seconds = others / chip.vector_flops
    return _ExtraSeconds(
        products.forward / product_rate + other_seconds,
        products.backward / product_rate + (2 + shape.layer_recomputes) * other_seconds,
    )


def get_computed_score_ratio(attention: AttentionShape) -> float:
    """Returns the share of all pairs that is computed: under a causal mask tiles of
    queries skip the keys after them, and those before their window or as far away as a
    chunk is long. Of attention with an indexer all are."""
    if not attention.causal or attention.heads.index_dim:
        return 1.0
    length = attention.query_len
    # A sixteenth of the sequence, rounded up, and 128 queries at least.
    tile = max(128, -(-length // 16))
    starts = np.arange(0, length, tile)
    stops = np.minimum(starts + tile, length)
    limit = limit_window(attention.window, attention.heads.chunk)
    window = min(limit or length, length)
    first_keys = np.maximum(starts - window + 1, 0)
    keys = stops - first_keys
    return float(np.sum(keys * (stops - starts)) / length**2)


def count_newton_schulz_flops(shape: StepShape) -> Number:
    """Counts FLOPs of the optimizer on each device: Muon's Newton–Schulz products of
    each hidden matrix [m, n], m the smaller, as if they were split as the moments are.

    An iteration X ← aX + (bA + cA²)X with A = XXᵀ has three: 2·m²·n each for A and for
    the last, 2·m³ for A² (Jordan et al. 2024, "Muon").
    """
    work = shape.work
    optimizer = work.config.optimizer
    total = 0.0
    if optimizer.kind != "muon":
        return total
    for spec in work.select_trained(work.specs):
        if spec.role != "matrix":
            continue
        input_dims, output_dims = get_input_output_dims(spec)
        fan_in = prod(spec.shape[dim] for dim in input_dims)
        fan_out = prod(spec.shape[dim] for dim in output_dims)
        m = min(fan_in, fan_out)
        n = max(fan_in, fan_out)
        iteration = 4.0 * m * m * n + 2.0 * m**3
        shards = shape.split.num_shards(shape.split.optimizer, spec.axes)
        # Layers and experts have a matrix each: spec.size / (m * n) in all.
        total += optimizer.ns_steps * iteration * spec.size / (m * n) / shards
    return total


def count_frozen_forward_flops(shape: StepShape) -> Number:
    """Counts FLOPs of a device in the forward passes that a step makes of models which
    the task only reads."""
    work = shape.work
    outside = {extra_pass.model for extra_pass in work.config.task.extra_passes()}
    devices = prod(shape.split.sizes.values())
    tokens = work.config.data.batch_size * work.tokens_per_row.decoder
    flops_per_token = 0.0
    for name, model in work.frozen_models.items():
        if name in outside:
            continue
        # A third of training: no backward pass.
        flops_per_token += count_training_flops_per_token(model).causal / 3
    return flops_per_token * tokens / devices


class ElementwiseBytes(NamedTuple):
    """Bytes that element-wise maps move between memory and chip: of layers, for one
    micro-batch; of the loss, for all; and of the optimizer's update."""

    forward: Number
    backward: Number
    loss: Number
    update: Number


def estimate_elementwise_bytes(shape: StepShape) -> ElementwiseBytes:
    """Estimates a device's element-wise traffic in a step."""
    work = shape.work
    split = shape.split
    elements = sum(
        stack.num_layers * _count_elementwise(shape, stack) for stack in work.stacks
    )
    forward = shape.per_stage(elements) * work.dtype_bytes
    # fp32 logits, in four passes.
    logits_width = work.config.model.vocab_size / split.num_devices(split.compute.vocab)
    loss = (
        4
        * work.head_passes
        * shape.loss_calls
        * shape.embedding_loss_tokens
        * logits_width
        * FP32
    )
    stored = count_stored_bytes(shape)
    # Gradients are as large as the parameters.
    gradients = stored["parameters"]
    updated = stored["parameters"] + gradients + stored["average"] + stored["optimizer"]
    return ElementwiseBytes(
        forward=forward,
        # Twice the forward pass's for gradients, and its own for each recomputation.
        backward=forward * (2 + shape.layer_recomputes),
        loss=loss,
        update=_READ_AND_WRITE * updated,
    )


def _count_elementwise(shape: StepShape, stack: StackCosts) -> Number:
    """Counts elements that a layer's element-wise maps read and write in a forward
    pass:

    - norms and additions: the residual stream (``_STREAM_PASSES``);
    - norms of latent attention: its narrow vectors;
    - rotations: queries, output, keys and values;
    - the activation: the hidden layer of the FFN;
    - what other mixers than attention state.
    """
    work = shape.work
    split = shape.split
    model = work.config.model
    encoder_rate = work.tokens_per_row.encoder_tokens_per_decoder_token
    stream = shape.residual_tokens * stack.token_ratio * model.d_model
    tokens = shape.micro_batch_tokens * stack.token_ratio

    # Elements a token of attention's arrays, and of latent vectors; rows times widths
    # of what matrices write into the FFN's hidden layer.
    rotated = 0.0
    for heads, key_rate in (
        (stack.heads(), 1.0),
        (stack.heads("cross_attention"), encoder_rate),
    ):
        widths = split.local_attention_widths(heads)
        keys_and_values = (widths.keys + widths.values) * key_rate
        rotated += widths.queries + widths.output + keys_and_values

    narrow = 0.0
    hidden = 0.0
    for group in stack.matmul_groups:
        rows_per_token = shape.expert_rows_per_token if group.has_experts else 1.0
        width = split.local_ffn_elements_per_token(group)
        hidden += tokens * rows_per_token * width
        narrow += _READ_AND_WRITE * group.latent_width

    has_one_branch = stack.num_branches == 1
    passes_by_placement = _ONE_BRANCH_PASSES if has_one_branch else _STREAM_PASSES
    stream_passes = passes_by_placement[stack.placement]
    if stack.cross_attention:
        stream_passes += _CROSS_ATTENTION_PASSES
    stated = count_stated_elements(shape, stack, "saved_elements")
    stated += count_stated_elements(shape, stack, "intermediate_elements")
    # Other streams are predicted and corrected: read and written twice.
    stream_passes += 2 * _READ_AND_WRITE * (stack.num_streams - 1)
    mixer_elements = tokens * (_READ_AND_WRITE * (rotated + stated) + narrow)
    # A gated activation reads the outputs of two maps and writes one array: three for
    # two, which stands for an ungated one too.
    return stream_passes * stream + mixer_elements + 1.5 * hidden


def count_attention_score_bytes(shape: StepShape) -> tuple[Number, Number]:
    """Returns bytes of attention's scores, forward and backward, where they go through
    memory."""
    one_pass = count_attention_scores(shape, fused=False) * FP32
    forward = one_pass * _FORWARD_SCORE_PASSES
    backward = one_pass * _BACKWARD_SCORE_PASSES + shape.score_recomputes * forward
    return forward, backward


class _PassSeconds(NamedTuple):
    """Seconds that a device computes in one pass over its layers, for one
    micro-batch."""

    products: Number
    attention: Number
    traffic: Number

    @property
    def total(self) -> Number:
        return self.products + self.attention + self.traffic


def estimate_time(
    shape: StepShape,
    network: Network,
    collectives: tuple[PlannedCollective, ...],
    *,
    efficiency: Efficiency | None = None,
    dtype: str = "bf16",
    transient_bytes: Number = 0.0,
) -> StepTime:
    """Estimates a step's time, with ``dtype`` in matrix products.

    Args:
        collectives: :func:`maxlm.plan.communication.list_collectives` of ``shape``.
        efficiency: default: of the chip's family.
        transient_bytes: bytes that a step takes and gives back.
    """
    chip = network.chip
    efficiency = efficiency or EFFICIENCY[chip.family]
    bandwidth = chip.memory_bandwidth * efficiency.memory
    matmul_rate = chip.peak_flops[dtype] * efficiency.matmul
    flops = count_device_flops(shape)
    moved = estimate_elementwise_bytes(shape)
    forward, backward = _estimate_layer_seconds(
        shape, network, efficiency, dtype, flops, moved
    )

    loss_forward = flops.loss / matmul_rate + moved.loss / bandwidth
    loss_backward = flops.loss_backward / matmul_rate

    # Communication that the computation of its own pass does not hide. A device
    # computes, and sends, in a pipeline's idle turns too.
    passes_with_bubble = shape.stage_passes_with_bubble
    collective_seconds = _sum_collective_seconds(
        shape, network, collectives, efficiency
    )
    exposed_forward = _count_exposed_seconds(
        collective_seconds["forward"],
        passes_with_bubble * forward.total + loss_forward,
        efficiency,
    )
    exposed_backward = _count_exposed_seconds(
        collective_seconds["backward"],
        passes_with_bubble * backward.total + loss_backward,
        efficiency,
    )
    exposed = exposed_forward + exposed_backward

    # Layers, for all micro-batches. What idle turns take, and their share of the
    # exposed communication, is reported as idle.
    micro_batches = shape.micro_batches
    products = (forward.products + backward.products) * micro_batches
    attention = (forward.attention + backward.attention) * micro_batches
    traffic = (forward.traffic + backward.traffic) * micro_batches
    layer_seconds = products + attention + traffic
    idle_passes = passes_with_bubble - micro_batches
    idle_share = idle_passes / passes_with_bubble

    # What a step does besides: the loss, the optimizer, frozen models, and on a CPU the
    # system, which hands out the step's memory.
    once_flops = count_newton_schulz_flops(shape) + count_frozen_forward_flops(shape)
    outer_flops = flops.loss + flops.loss_backward + once_flops
    allocated_bytes = _count_newly_allocated_bytes(transient_bytes)
    return StepTime(
        products=products + outer_flops / matmul_rate,
        attention=attention,
        traffic=traffic
        + (moved.loss + moved.update) / bandwidth
        + allocated_bytes / chip.page_allocation_bandwidth,
        exposed=exposed * (1 - idle_share) + collective_seconds["once"],
        idle=layer_seconds / micro_batches * idle_passes + exposed * idle_share,
        communication=sum(collective_seconds.values()),
        forward=micro_batches * forward.total + loss_forward,
    )


def estimate_forward_seconds(
    shape: StepShape,
    network: Network,
    *,
    dtype: str = "bf16",
    makes_logits: bool = True,
) -> Number:
    """Estimates the time of forward passes over a step's rows, and nothing else, with
    ``dtype`` in matrix products.

    Args:
        makes_logits: whether they make the logits of every token.
    """
    chip = network.chip
    efficiency = EFFICIENCY[chip.family]
    flops = count_device_flops(shape)
    moved = estimate_elementwise_bytes(shape)
    forward, _ = _estimate_layer_seconds(
        shape, network, efficiency, dtype, flops, moved
    )
    computation = shape.stage_passes_with_bubble * forward.total
    if makes_logits:
        products = flops.loss / (chip.peak_flops[dtype] * efficiency.matmul)
        traffic = moved.loss / (chip.memory_bandwidth * efficiency.memory)
        computation = computation + products + traffic
    collectives = list_collectives(shape)
    seconds = _sum_collective_seconds(shape, network, collectives, efficiency)
    exposed = _count_exposed_seconds(seconds["forward"], computation, efficiency)
    return computation + exposed


def _count_exposed_seconds(
    communication: Number, computation: Number, efficiency: Efficiency
) -> Number:
    """Returns the seconds of a pass's communication that nothing hides: at most the
    share ``efficiency.hidden`` of it runs beside computation, and no longer than there
    is computation."""
    hidden = np.minimum(communication * efficiency.hidden, computation)
    return communication - hidden


def _count_newly_allocated_bytes(transient_bytes: Number) -> Number:
    """Counts the bytes that a step gets from the system anew: those of blocks too large
    for the C library to keep."""
    blocks = transient_bytes / _REUSED_BLOCK_BYTES
    # A block up to a tenth larger than the limit counts in part: the plan's bytes are
    # off by some per cent, so that it may lie on either side.
    new_share = np.clip(10 * (blocks - 1), 0, 1)
    return transient_bytes * new_share


def _estimate_layer_seconds(
    shape: StepShape,
    network: Network,
    efficiency: Efficiency,
    dtype: str,
    flops: DeviceFlops,
    moved: ElementwiseBytes,
) -> tuple[_PassSeconds, _PassSeconds]:
    """Estimates what a device computes in its layers, forward and backward, for one
    micro-batch."""
    chip = network.chip
    bandwidth = chip.memory_bandwidth * efficiency.memory
    matmul_rate = chip.peak_flops[dtype] * efficiency.matmul
    # Attention is in bf16 where other products are in fp8.
    attention_dtype = "bf16" if dtype == "fp8" else dtype
    attention_rate = chip.peak_flops[attention_dtype] * efficiency.matmul

    # Softmax on the vector units, of scores that a kernel keeps on the chip.
    on_chip_scores = 0.0
    if shape.fused_attention:
        on_chip_scores = count_attention_scores(shape, fused=True)
    softmax = on_chip_scores * _FORWARD_OPS_PER_SCORE / chip.vector_flops
    softmax_backward = on_chip_scores * _BACKWARD_OPS_PER_SCORE / chip.vector_flops
    softmax_backward += shape.score_recomputes * softmax
    # The other scores go through memory.
    score_bytes, score_bytes_backward = count_attention_score_bytes(shape)
    extra = _estimate_extra_seconds(shape, chip, attention_rate)

    forward = _PassSeconds(
        products=flops.forward / matmul_rate,
        attention=flops.attention_forward / attention_rate
        + softmax
        + score_bytes / bandwidth,
        traffic=moved.forward / bandwidth + extra.forward,
    )
    backward = _PassSeconds(
        products=flops.backward / matmul_rate,
        attention=flops.attention_backward / attention_rate
        + softmax_backward
        + score_bytes_backward / bandwidth,
        traffic=moved.backward / bandwidth + extra.backward,
    )
    return forward, backward


def _sum_collective_seconds(
    shape: StepShape,
    network: Network,
    collectives: Iterable[PlannedCollective],
    efficiency: Efficiency,
) -> dict[Phase, Number]:
    """Sums up the seconds of a step's collectives in each phase."""
    total: dict[Phase, Number] = {"forward": 0.0, "backward": 0.0, "once": 0.0}
    for collective in collectives:
        one_run = network.estimate_seconds(
            collective.kind, collective.axes, collective.whole_bytes, shape.split
        )
        one_run = one_run / efficiency.network
        total[collective.phase] = total[collective.phase] + collective.count * one_run
    return total
