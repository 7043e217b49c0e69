"""Main memory of forward passes that nothing is differentiated through."""

import numpy as np

from maxlm.plan.memory import WorkingSet
from maxlm.plan.stacks import get_num_streams
from maxlm.plan.workload import FP32, MeshPartitioning, Number, RunWorkload, StepShape

# Arrays of the residual stream's width that are alive together: the stream, and what
# its norms read and return.
_STREAM_ARRAYS = 4
# What a layer's widest product writes, and what is made of it.
_LAYER_ARRAYS = 2


def count_forward_token_bytes(work: RunWorkload, split: MeshPartitioning) -> Number:
    """Counts the bytes of a token in a layer: the residual stream and its norms, and
    all that the layer's matrices write."""
    model = work.config.model
    layer_width = 0.0
    for group in work.matmul_layer_counts:
        layer_width = np.maximum(layer_width, split.local_non_residual_width(group))
    streams_width = get_num_streams(model) * model.d_model
    elements = _STREAM_ARRAYS * streams_width + _LAYER_ARRAYS * layer_width
    if model.layer_inputs is not None:
        # Made for all layers at once, of a row and a projection.
        elements = elements + 3 * model.num_layers * model.layer_inputs.width
    return elements * work.dtype_bytes


def count_layer_weight_bytes(work: RunWorkload, split: MeshPartitioning) -> Number:
    """Counts the bytes of the matrices of the largest layer, cast and gathered."""
    largest = 0.0
    for stack in work.stacks:
        size = sum(
            kernel.size / split.num_shards(split.compute, kernel.axes)
            for group in stack.matmul_groups
            for kernel in group.kernels
        )
        largest = np.maximum(largest, size * work.dtype_bytes)
    return largest


def count_head_bytes(work: RunWorkload, split: MeshPartitioning) -> Number:
    """Counts the bytes of the output head, cast and gathered."""
    num_shards = split.num_shards(split.compute, work.head.axes)
    return work.head.size * work.dtype_bytes / num_shards


def list_forward_working_set(shape: StepShape, *, makes_logits: bool) -> WorkingSet:
    """Lists what is alive at most during the forward pass of a micro-batch, which keeps
    nothing of a layer for later.

    Args:
        makes_logits: whether the pass makes the logits of every token.
    """
    work = shape.work
    split = shape.split
    tokens = shape.micro_batch_tokens
    token_bytes = count_forward_token_bytes(work, split)
    arrays: WorkingSet = {
        "a layer's kernels, gathered": count_layer_weight_bytes(work, split),
        "residual stream and a layer's arrays": tokens * token_bytes,
    }
    if work.experts is not None:
        # Rows as experts receive them and give them back.
        row_width = work.experts.input_dim or work.config.model.d_model
        rows_bytes = shape.expert_buffer_rows * row_width * work.dtype_bytes
        arrays["rows of experts"] = 2 * rows_bytes
    if makes_logits:
        chunk_tokens = np.minimum(work.config.task.chunk_tokens, tokens)
        vocab_ways = split.num_devices(split.compute.vocab)
        logits = chunk_tokens * work.config.model.vocab_size / vocab_ways
        arrays["head, gathered"] = count_head_bytes(work, split)
        arrays["logits of a chunk"] = logits * (FP32 + work.dtype_bytes)
    return arrays
