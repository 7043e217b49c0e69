"""Linear recurrences over tokens in chunks: Mamba-2's state space, Gated DeltaNet, Kimi
Delta Attention, lightning and gated linear attention.

Shapes: q and k [B, T, H, K]; v [B, T, N, V], N a multiple of H; log decays [B, T, N] or
[B, T, N, K]; states [B, N, K, V].

:func:`linear_recurrence` is differentiable, resets states where packed documents start,
and goes on from a state. :func:`linear_recurrence_step` is one token of it.
:func:`summarize_run` and :func:`combine_runs` are for a sequence that is split over
devices, :func:`linear_recurrence_forward` and :func:`linear_recurrence_backward` for
callers that write the gradient of a larger program.
"""

from pallas_kernels.linear_recurrence.api import (
    linear_recurrence,
    linear_recurrence_backward,
    linear_recurrence_forward,
)
from pallas_kernels.linear_recurrence.runs import (
    StateTransition,
    apply_run,
    combine_runs,
    find_segment_starts,
    summarize_run,
)
from pallas_kernels.linear_recurrence.sequential import (
    linear_recurrence_reference,
    linear_recurrence_step,
)

__all__ = [
    "StateTransition",
    "apply_run",
    "combine_runs",
    "find_segment_starts",
    "linear_recurrence",
    "linear_recurrence_backward",
    "linear_recurrence_forward",
    "linear_recurrence_reference",
    "linear_recurrence_step",
    "summarize_run",
]
