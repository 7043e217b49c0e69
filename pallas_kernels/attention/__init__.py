"""Exact attention in tiles: kernels for TPUs and GPUs, and a form that any XLA backend
compiles.

Shapes: q [B, S, N, H]; k [B, T, K, H]; v [B, T, K, Hv], N a multiple of K (grouped
queries: query head n reads kv head n // (N / K)).

:func:`attention` is differentiable. :func:`attention_forward` and
:func:`attention_backward` are its two halves, for a caller that holds the keys in
blocks (a ring of devices): log-sum-exps join the blocks' outputs
(:func:`merge_attention`), and each block's gradients need no other's.
"""

from pallas_kernels.attention.api import (
    attention,
    attention_backward,
    attention_forward,
)
from pallas_kernels.attention.combine import (
    compute_row_delta,
    merge_attention,
    sink_gradient,
)

__all__ = [
    "attention",
    "attention_backward",
    "attention_forward",
    "compute_row_delta",
    "merge_attention",
    "sink_gradient",
]
