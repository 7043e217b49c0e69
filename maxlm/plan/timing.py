"""Estimates a step's time: a roofline with three constants a family of chips.

Matrix products run at a share of the peak, everything else that touches memory at a
share of its bandwidth, and communication beside them where it can. Per micro-batch,
forward and backward apart:

    products     FLOPs / (peak · matmul)
    attention    its FLOPs likewise, and its scores' element-wise work: on the vector units, or
                 through memory where no kernel keeps them on the chip
    traffic      bytes of element-wise maps, of parameters and the optimizer's state / bandwidth;
                 on a CPU also a step's memory, which the system hands out page by page
    exposed      of communication: all but the share ``hidden`` of it, and but what there is
                 computation for to run beside it

A pipeline's idle turns take as long as its others
(``StepShape.stage_passes_with_bubble``).

The constants (``EFFICIENCY``) are fitted to published runs by
``benchmarks/plan_mfu.py``, for all rows of a family together; a CPU's to runs here
(``benchmarks/plan_cpu.py``).
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.optim.kinds import get_input_output_dims
from maxlm.plan.layout import count_training_flops_per_token
from maxlm.plan.memory import persistent_bytes
from maxlm.plan.network import PASSES, Network, Phase, PlannedCollective
from maxlm.plan.stacks import AttentionShape, Stack
from maxlm.plan.workload import FP32, Number, StepShape

# Vector operations for each score of attention: softmax and masks, forward; their
# gradients and the softmax again, backward. From the static schedules of the best
# published TPU kernels at head size 128: 138 µs forward and 393 µs backward on a v5p,
# 161 and 277 µs on a v6e, for 67 M scores, less the products' time.
_SCORE_OPS = {"forward": 12.0, "backward": 20.0}
# Passes over the residual stream of a layer's norms and additions.
_STREAMS = {"pre": 8, "post": 8, "sandwich": 12, "parallel": 7, "parallel_shared": 5}
# Passes over fp32 scores in memory where no kernel keeps them on the chip.
_SCORE_PASSES = {"forward": 4.0, "backward": 8.0}
# Blocks up to this size the C library keeps for the next step (glibc's
# DEFAULT_MMAP_THRESHOLD_MAX).
_KEPT_BLOCK = 32 * 2**20


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
    "tpu": DecodeEfficiency(0.62, 2e-3),
    "nvidia": DecodeEfficiency(0.85, 1e-3),
    "cpu": DecodeEfficiency(0.85, 1e-3),
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

    @property
    def total(self) -> Number:
        return self.products + self.attention + self.traffic + self.exposed + self.idle


@dataclass(frozen=True)
class DeviceFlops:
    """FLOPs of a device in one pass of all its layers, recomputation included; and of
    the loss."""

    forward: Number
    backward: Number
    attention_forward: Number
    attention_backward: Number
    loss: Number
    """Forward FLOPs of the loss, for all micro-batches."""
    loss_backward: Number


def count_device_flops(shape: StepShape) -> DeviceFlops:
    """Counts what a device computes: its layers for one micro-batch, the loss for
    all."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    forward = backward = 0.0
    for group, layers in work.matmul_layer_counts.items():
        share = 1.0
        if group.has_experts and work.experts is not None:
            share = shape.expert_rows_per_token / work.experts.num_experts
        tokens = shape.per_stage(layers) * group.token_ratio * shape.micro_batch_tokens
        for kernel in group.kernels:
            # Rows go to their experts: over `expert` a device has as many as it had
            # tokens.
            axes = tuple(axis for axis in kernel.axes if axis != "expert")
            one = 2 * kernel.size * share * tokens / split.num_shards(rules, axes)
            forward += one
            again = work.is_kernel_recomputed(group, kernel, shape.remat)
            backward += one * (1 + kernel.is_trained + again)
            if (
                group.has_experts
                and shape.remat == "none"
                and group.output_features == "mlp"
            ):
                backward += one  # experts' hidden activations are never kept
    again = shape.remat != "none"
    for stack in work.stacks:
        layers = shape.per_stage(stack.num_layers) * stack.token_ratio
        for kernel in stack.adapter_kernels:
            to_stream = "embed" in kernel.axes[kernel.num_input_dims :]
            tokens = shape.residual_tokens if to_stream else shape.micro_batch_tokens
            one = (
                2 * layers * tokens * kernel.size / split.num_shards(rules, kernel.axes)
            )
            forward, backward = forward + one, backward + one * (2 + again)
    if work.router is not None:
        tokens = shape.per_stage(work.num_expert_layers) * shape.residual_tokens
        router = 2 * work.router.size * tokens
        forward += router
        backward += router * (1 + work.router.is_trained + (shape.remat != "none"))
    once = gradients = 0.0
    for own, layers in work.attention_layer_counts.items():
        scores = _scores(shape, own, layers)
        head = own.heads.head_dim
        value = own.heads.value_dim
        once += 2 * scores * (head + value)
        # Scores, and gradients of weights, queries, keys and values.
        gradients += 2 * scores * (3 * head + 2 * value)
    loss = loss_backward = 0.0
    outer = dict.fromkeys(work.non_layer_kernels, shape.embedding_loss_residual_tokens)
    for kernel, tokens in {work.head: shape.embedding_loss_tokens, **outer}.items():
        one = (
            2
            * shape.loss_calls
            * tokens
            * kernel.size
            / split.num_shards(rules, kernel.axes)
        )
        loss, loss_backward = loss + one, loss_backward + one * (1 + kernel.is_trained)
    backward = backward + np.where(shape.pipelined, forward, 0.0)
    gradients = gradients + shape.score_recomputes * once
    return DeviceFlops(forward, backward, once, gradients, loss, loss_backward)


def count_attention_scores(shape: StepShape, *, fused: bool) -> Number:
    """Counts scores of attention on a device in one pass of its layers, as far as they
    are computed: those that a kernel keeps on the chip, or the others."""
    scores = (
        _scores(shape, own, layers)
        for own, layers in shape.work.attention_layer_counts.items()
        if (shape.fused_attention and not own.biased) == fused
    )
    return sum(scores, start=0.0)


def _scores(shape: StepShape, own: AttentionShape, layers: int) -> Number:
    seen = layers * own.token_ratio * own.key_len * computed_score_ratio(own)
    heads = own.heads.num_heads / shape.split.num_devices(shape.split.compute.heads)
    return shape.per_stage(seen) * shape.micro_batch_tokens * heads


def count_extra_forward_flops(shape: StepShape) -> Number:
    """Counts a device's forward FLOPs beside products and attention in one pass of its
    layers."""
    work = shape.work
    split = shape.split
    flops = 0.0
    for stack in work.stacks:
        for own in (
            branch.costs for branch in stack.branches if branch.costs.extra_flops
        ):
            layers = shape.per_stage(stack.num_layers)
            tokens = layers * stack.token_ratio * shape.micro_batch_tokens
            flops += (
                own.extra_flops
                * tokens
                / split.num_shards(split.compute, own.flops_axes)
            )
    return flops


def computed_score_ratio(attention: AttentionShape) -> float:
    """The share of all pairs that is computed: under a causal mask tiles of queries
    skip the keys after them, and those before their window."""
    if not attention.causal:
        return 1.0
    length = attention.query_len
    tile = max(128, -(-length // 16))
    starts = np.arange(0, length, tile)
    stops = np.minimum(starts + tile, length)
    keys = stops - np.maximum(starts - min(attention.window or length, length) + 1, 0)
    return float(np.sum(keys * (stops - starts)) / length**2)


def count_newton_schulz_flops(shape: StepShape) -> Number:
    """Counts FLOPs of the optimizer on each device: Muon's Newton–Schulz products,
    three an iteration, of each hidden matrix [m, n], m the smaller (Jordan et al.
    2024); as if they were split as the moments are."""
    work = shape.work
    config = shape.work.config.optimizer
    total = 0.0
    if config.kind != "muon":
        return total
    for spec in work.select_trained(work.specs):
        if spec.role == "matrix":
            m, n = sorted(
                prod(spec.shape[d] for d in dims)
                for dims in get_input_output_dims(spec)
            )
            one = 4.0 * m * m * n + 2.0 * m**3
            shards = shape.split.num_shards(shape.split.optimizer, spec.axes)
            total = total + config.ns_steps * one * spec.size / (m * n) / shards
    return total


def count_frozen_forward_flops(shape: StepShape) -> Number:
    """Counts FLOPs of a device in the forward passes of models that the task only
    reads."""
    work = shape.work
    devices = prod(shape.split.sizes.values())
    tokens = work.config.data.batch_size * work.tokens_per_row.decoder
    each = (
        count_training_flops_per_token(own).causal / 3
        for own in work.frozen_models.values()
    )
    return sum(each, start=0.0) * tokens / devices


class ElementwiseBytes(NamedTuple):
    """Bytes that element-wise maps move between memory and chip: of layers, for one
    micro-batch; of the loss, for all; and of the optimizer's update."""

    forward: Number
    backward: Number
    loss: Number
    update: Number


def estimate_elementwise_bytes(shape: StepShape) -> ElementwiseBytes:
    """Estimates a device's element-wise traffic in a step."""
    work, split, rules = shape.work, shape.split, shape.split.compute
    model, itemsize = work.config.model, work.dtype_bytes
    elements = sum(
        stack.num_layers * _count_elementwise(shape, stack) for stack in work.stacks
    )
    forward = shape.per_stage(elements) * itemsize
    chunk = model.vocab_size / split.num_devices(rules.vocab)
    loss = 4 * shape.loss_calls * shape.embedding_loss_tokens * chunk * FP32
    state = persistent_bytes(shape)
    # Parameters, their average and moments are read and written, and so are gradients.
    update = 2 * (2 * state["parameters"] + state["average"] + state["optimizer"])
    return ElementwiseBytes(
        forward, forward * (2 + shape.layer_recomputes), loss, update
    )


def _count_elementwise(shape: StepShape, stack: Stack) -> Number:
    """Elements that a layer's element-wise maps read and write in a forward pass: norms
    the stream and the narrow vectors of latent attention, additions the stream twice;
    rotations queries, output, keys and values; the activation."""
    work, split, model = shape.work, shape.split, shape.work.config.model
    stream = shape.residual_tokens * stack.token_ratio * model.d_model
    tokens = shape.micro_batch_tokens * stack.token_ratio
    each = 0.0
    narrow = 0.0
    hidden = 0.0
    encoder_rate = work.tokens_per_row.encoder_tokens_per_decoder_token
    for heads, seen in (
        (stack.heads(), 1.0),
        (stack.heads("cross_attention"), encoder_rate),
    ):
        sizes = split.local_attention_widths(heads)
        each += sizes.queries + sizes.output + (sizes.keys + sizes.values) * seen
    for group in stack.matmul_groups:
        served = shape.expert_rows_per_token if group.has_experts else 1.0
        hidden += tokens * served * split.local_ffn_elements_per_token(group)
        narrow += 2 * group.latent_width
    streams = _STREAMS[model.placement] + (4 if stack.cross_attention else 0)
    return streams * stream + tokens * (2 * each + narrow) + 1.5 * hidden


def attention_score_bytes(shape: StepShape) -> tuple[Number, Number]:
    """Bytes of attention's scores, forward and backward, where they go through
    memory."""
    one = count_attention_scores(shape, fused=False) * FP32
    forward = one * _SCORE_PASSES["forward"]
    return forward, one * _SCORE_PASSES["backward"] + shape.score_recomputes * forward


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
    chip, slots, micro = (
        network.chip,
        shape.stage_passes_with_bubble,
        shape.micro_batches,
    )
    own = efficiency or EFFICIENCY[chip.family]
    flops = count_device_flops(shape)
    bandwidth = chip.memory_bandwidth * own.memory
    rate = chip.peak_flops[dtype] * own.matmul
    # Attention is in bf16 where other products are in fp8.
    attention_rate = chip.peak_flops["bf16" if dtype == "fp8" else dtype] * own.matmul
    kept = count_attention_scores(shape, fused=True) if shape.fused_attention else 0.0
    softmax, softmax_back = (
        kept * ops / chip.vector_flops for ops in _SCORE_OPS.values()
    )
    softmax_back += shape.score_recomputes * softmax
    ahead, back, loss_bytes, update = estimate_elementwise_bytes(shape)
    scores, scores_back = attention_score_bytes(shape)
    other = count_extra_forward_flops(shape) / chip.vector_flops
    # Of matrix products, attention and the rest.
    passes = {
        "forward": (
            flops.forward / rate,
            flops.attention_forward / attention_rate + softmax + scores / bandwidth,
            ahead / bandwidth + other,
        ),
        "backward": (
            flops.backward / rate,
            flops.attention_backward / attention_rate
            + softmax_back
            + scores_back / bandwidth,
            back / bandwidth + (2 + shape.layer_recomputes) * other,
        ),
    }
    loss = flops.loss / rate + loss_bytes / bandwidth, flops.loss_backward / rate
    once_flops = count_newton_schulz_flops(shape) + count_frozen_forward_flops(shape)

    sent: dict[Phase, Number] = {"forward": 0.0, "backward": 0.0, "once": 0.0}
    for c in collectives:
        one = network.seconds(c.kind, c.axes, c.whole_bytes, shape.split) / own.network
        sent[c.phase] = sent[c.phase] + c.count * one
    exposed = 0.0
    once = sent["once"]
    for phase, end in zip(PASSES, loss, strict=True):
        busy = slots * sum(passes[phase]) + end
        exposed += sent[phase] - np.minimum(sent[phase] * own.hidden, busy)
    share = (slots - micro) / slots
    parts = [sum(pair) * micro for pair in zip(*passes.values(), strict=True)]
    # From there to a tenth more it may be either: the plan's bytes are off by some per
    # cent.
    new = transient_bytes * np.clip(10 * (transient_bytes / _KEPT_BLOCK - 1), 0, 1)
    return StepTime(
        products=parts[0] + (flops.loss + flops.loss_backward + once_flops) / rate,
        attention=parts[1],
        traffic=parts[2]
        + (loss_bytes + update) / bandwidth
        + new / chip.page_allocation_bandwidth,
        exposed=exposed * (1 - share) + once,
        idle=sum(parts) / micro * (slots - micro) + exposed * share,
        communication=sum(sent.values()),
        forward=micro * sum(passes["forward"]) + loss[0],
    )
