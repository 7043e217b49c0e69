"""Bytes that are alive in each phase of a step, beside those that rest and those that are kept for
the backward pass (``plan/memory.py``)."""

import jax.numpy as jnp
import numpy as np

from maxlm.models.costs import AttentionCosts
from maxlm.models.remat import SAVED
from maxlm.plan.shape import StepShape
from maxlm.plan.stacks import MatmulGroup, Stack
from maxlm.plan.workload import FP32, Number

Parts = dict[str, Number]
"""Name of arrays → bytes on each device."""
_BRANCH = "what a branch adds before its last norm, its gradient"
_MEMORY = "gradient of the encoder's output"
# At once: scores of attention (pallas_kernels/attention/xla.py), an expert's hidden activations.
_SCORE_BYTES, _HIDDEN_BYTES = 1 << 26, 1 << 30


def list_layer_working_sets(shape: StepShape, stack: Stack) -> dict[str, Parts]:
    """Phase → what is alive besides while a layer of a stack is differentiated, by branch."""
    sets = {}
    if heads := stack.heads():
        biased = shape.work.config.model.positions.kind == "relative"
        sets["a layer's attention"] = _attention(shape, stack, heads, stack.token_ratio, biased)
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
    """All branches together. XLA:GPU copies kernels into the stream that rest in the compute dtype,
    of all layers at once, into another layout; others are cast layer by layer."""
    parts = {f"{phase}: {p}": size for phase, own in branches.items() for p, size in own.items()}
    mixer = (group for group in stack.matmul_groups if group.branch != "ffn")
    copied = [
        spec
        for spec in stack.base_specs.values()
        if spec.role == "matrix" and spec.axes[-1] == "embed"
        if jnp.dtype(spec.dtype).itemsize == shape.work.dtype_bytes
    ]
    return parts | {
        "other kernels, gathered": sum(map(shape.gathered_weight_bytes, mixer), start=0.0),
        "kernels into the stream, copied": shape.split.local_bytes(shape.split.storage, copied),
    }


def _stream(shape: StepShape, stack: Stack) -> Number:
    """One array of the residual stream's width."""
    width = shape.work.config.model.d_model * shape.work.dtype_bytes
    return shape.residual_tokens * stack.token_ratio * width


def _mlp(shape: StepShape, stack: Stack, group: MatmulGroup) -> Parts:
    """Its maps' outputs and their cotangents, their kernels, the stream and its gradient, norms'
    inputs and outputs."""
    work, itemsize = shape.work, shape.work.dtype_bytes
    beside = (m for m in stack.matmul_groups if m.module == group.module)
    count, tokens = len(group.kernels), shape.micro_batch_tokens * stack.token_ratio
    one = tokens * shape.split.local_ffn_elements_per_token(group) / count * itemsize
    kept = 1 if "mlp_up" in SAVED.get(shape.remat, ()) else count + 1
    outputs = 0 if shape.remat == "none" else kept
    stream, inner = _stream(shape, stack), tokens * work.config.model.d_model * itemsize
    # Where the sequence is gathered, the stream's width is there five times in both lengths.
    width = np.where(np.greater(inner, stream), 5 * inner + 4 * stream, 5 * stream)
    return {
        "kernels, gathered": sum(map(shape.gathered_weight_bytes, beside), start=0.0),
        "hidden activations and their gradients": one * (outputs + count),
        "residual stream, norms, their gradients": width,
    }


def _mixer(shape: StepShape, stack: Stack) -> Parts:
    """A mixer without heads: its matrices' products, their fp32 states and gradients."""
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
    """Attention that looks at ``seen`` tokens for each of the batch, with learnt biases or not."""
    split, work = shape.split, shape.work
    sizes, itemsize = split.local_attention_widths(heads), work.dtype_bytes
    tokens = shape.micro_batch_tokens * stack.token_ratio
    length, keys = (work.tokens_per_row.decoder * rate for rate in (stack.token_ratio, seen))
    # A tile of queries with all keys.
    scores = shape.micro_batch_size * sizes.heads * min(max(128, length / 16), length) * keys * FP32
    fused = shape.fused_attention and not biased
    scores = 0.0 if fused else 3 * np.minimum(scores, _SCORE_BYTES)
    whole = shape.micro_batch_tokens * seen * split.num_devices(split.compute.seq)
    narrow = sum(group.latent_width for group in stack.matmul_groups)
    parts = {
        "queries, output and their gradients": tokens
        * (sizes.queries * (itemsize + FP32) + sizes.output * 2 * itemsize),
        "keys, values and their gradients": whole * (sizes.keys + sizes.values) * (itemsize + FP32),
        "scores of a tile": scores,
        "residual stream, norms, their gradients": 4 * _stream(shape, stack),
    }
    if narrow:
        # The vectors before norms and after, and their gradients; parts of heads, not yet joined.
        joined = sizes.queries + sizes.keys
        parts["latent vectors, parts of heads"] = tokens * itemsize * (4 * narrow + joined)
    return parts


def _experts(shape: StepShape, stack: Stack) -> Parts:
    work, rows, itemsize = shape.work, shape.expert_buffer_rows, shape.work.dtype_bytes
    width = work.config.model.d_model
    maps = [m for m in stack.matmul_groups if m.has_experts]
    weights = sum(map(shape.gathered_weight_bytes, maps))
    largest = max(k.size for m in maps for k in m.kernels) / sum(m.size for m in maps)
    inner = next(m for m in maps if m.output_features == "mlp")
    hidden = rows * shape.split.local_ffn_elements_per_token(inner) / len(inner.kernels) * itemsize
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
    tokens, states = shape.embedding_loss_tokens, 5 + 3 * len(work.non_layer_kernels)
    chunk = np.minimum(work.config.task.chunk_tokens, tokens)
    logits = chunk * model.vocab_size / split.num_devices(split.compute.vocab)
    return {
        "head, gathered": shape.gathered_weight_bytes(work.head),
        "its gradient": size * FP32 if work.head.is_trained else 0.0,
        "logits of a chunk": logits * (FP32 + itemsize),
        "hidden states and their gradients": states * tokens * model.d_model * itemsize,
    }


def list_update_working_set(shape: StepShape) -> Parts:
    """Lists the updates gathered, where each device updates a part of what it holds (ZeRO-1 and 2):
    the two largest parameters' are alive together."""
    work, split, whole = shape.work, shape.split, []
    for spec in work.select_trained(work.specs):
        held = split.local_bytes(split.storage, [spec])
        finer = split.local_bytes(split.optimizer, [spec]) < held
        whole.append(np.where(finer, held, 0.0))
    largest = np.sort(np.stack(np.broadcast_arrays(*whole)), axis=0)[-2:]
    return {"updates, gathered": largest.sum(axis=0)}
