"""What is alive in each phase of a step beside what rests and what is kept for the backward pass.

Counted in arrays that are alive together, as XLA's buffer assignments show them
(``benchmarks/plan_memory.py`` compares).
"""

import numpy as np

from maxlm.models.remat import SAVED
from maxlm.plan.communication.collective import FP32
from maxlm.plan.shape import Shape, received_rows
from maxlm.plan.workload import Map, Number, Split

Parts = dict[str, Number]
"""What → bytes on each device."""
LOSS, UPDATE = "the loss", "the update"
# At once: scores of attention (pallas_kernels/attention/xla.py), an expert's hidden activations.
_SCORE_BYTES, _HIDDEN_BYTES = 1 << 26, 1 << 30


def working_sets(shape: Shape) -> dict[str, Parts]:
    """Phase → what is alive besides. A layer's are of its backward pass, branch by branch."""
    sets = {"a layer's attention": _attention(shape)}
    for map_ in shape.work.maps:
        if map_.writes == "mlp" and not map_.experts:
            sets[f"a layer's {_module(map_)}"] = _mlp(shape, map_)
    if shape.work.config.model.moe is not None:
        sets["a layer's experts"] = _experts(shape)
    return sets | {LOSS: _loss(shape), UPDATE: _update(shape)}


def _stream(shape: Shape) -> Number:
    """One array of the residual stream's width."""
    return shape.residual_tokens * shape.work.config.model.d_model * shape.work.dtype_bytes


def _mlp(shape: Shape, map_: Map) -> Parts:
    """Its maps' outputs and their cotangents, their kernels, the stream and its gradient, norms'
    inputs and outputs."""
    work, itemsize = shape.work, shape.work.dtype_bytes
    back = next(m for m in work.maps if m.reads == "mlp" and _module(m) == _module(map_))
    count = len(map_.kernels)
    one = shape.tokens * hidden_elements(map_, shape.split) / count * itemsize
    outputs = count + 1
    if shape.remat == "none":
        outputs = 0  # all kept
    elif "mlp_up" in SAVED[shape.remat]:
        outputs = 1
    stream, inner = _stream(shape), shape.tokens * work.config.model.d_model * itemsize
    # Where the sequence is gathered, the stream's width is there five times in both lengths.
    width = np.where(np.greater(inner, stream), 5 * inner + 4 * stream, 5 * stream)
    return {
        "kernels, gathered": _weights(map_, shape) + _weights(back, shape),
        "hidden activations and their gradients": one * (outputs + count),
        "residual stream, norms, their gradients": width,
    }


def _attention(shape: Shape) -> Parts:
    split, rules, work = shape.split, shape.split.compute, shape.work
    attention, itemsize = work.config.model.attention, work.dtype_bytes
    heads = attention.num_heads / split.ways(rules.heads)
    keys = attention.num_kv_heads / split.ways(rules.kv_heads)
    one = shape.tokens * attention.head_dim
    seq_len = work.config.data.seq_len
    # A tile of queries with all keys.
    scores = shape.rows * heads * min(max(128, seq_len / 16), seq_len) * seq_len * FP32
    scores = 0.0 if shape.fused_attention else 3 * np.minimum(scores, _SCORE_BYTES)
    whole = one * keys * split.ways(rules.seq)
    return {
        "queries, output and their gradients": one * heads * (3 * itemsize + FP32),
        "keys, values and their gradients": whole * (2 * itemsize + 2 * FP32),
        "scores of a tile": scores,
        "residual stream, norms, their gradients": 4 * _stream(shape),
    }


def _experts(shape: Shape) -> Parts:
    work, moe = shape.work, shape.work.config.model.moe
    assert moe is not None
    rows, itemsize = received_rows(shape), work.dtype_bytes
    width = work.config.model.d_model
    maps = [m for m in work.maps if m.experts]
    weights = sum(_weights(m, shape) for m in maps)
    largest = max(k.size for m in maps for k in m.kernels) / sum(m.size for m in maps)
    hidden = rows * moe.d_ff / shape.split.ways(shape.split.compute.mlp) * itemsize
    return {
        "kernels, gathered, and one's gradient": (1 + largest) * weights,
        "rows received and their gradients": rows * width * (2 * itemsize + FP32),
        "hidden activations and their gradients": 3 * np.minimum(hidden, _HIDDEN_BYTES),
        "residual stream, norms, their gradients": 4 * _stream(shape),
    }


def _loss(shape: Shape) -> Parts:
    work, split = shape.work, shape.split
    model, itemsize = work.config.model, work.dtype_bytes
    size = work.head.size / split.shards(split.compute, ("embed", "vocab"))
    tokens = shape.end_tokens
    chunk = np.minimum(work.config.objective.chunk_tokens, tokens)
    logits = chunk * model.vocab_size / split.ways(split.compute.vocab)
    return {
        "head, gathered": size * itemsize,
        "its gradient": size * FP32,
        "logits of a chunk": logits * (FP32 + itemsize),
        "hidden states and their gradients": 5 * tokens * model.d_model * itemsize,
    }


def _update(shape: Shape) -> Parts:
    """Where each device updates a part of what it holds (ZeRO-1 and 2), updates are gathered: the
    two largest parameters' are alive together."""
    work, split = shape.work, shape.split
    whole = [
        np.where(
            np.greater(split.shards(split.optimizer, s.axes), split.shards(split.storage, s.axes)),
            s.nbytes / split.shards(split.storage, s.axes),
            0.0,
        )
        for s in work.specs.values()
    ]
    largest = np.sort(np.stack(np.broadcast_arrays(*whole)), axis=0)[-2:]
    return {"updates, gathered": largest.sum(axis=0)}


def _module(map_: Map) -> str:
    return map_.name.partition(":")[0]


def _weights(map_: Map, shape: Shape) -> Number:
    """Bytes of a map's kernels in use."""
    split = shape.split
    return sum(
        k.size * shape.work.dtype_bytes / split.shards(split.compute, k.axes) for k in map_.kernels
    )


def hidden_elements(map_: Map, split: Split) -> Number:
    """Elements a token of what a map writes into the FFN's width on one device."""
    if map_.writes != "mlp":
        return 0.0
    return sum(k.shape[-1] / split.shards(split.compute, k.axes[-1:]) for k in map_.kernels)
