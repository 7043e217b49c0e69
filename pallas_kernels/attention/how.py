"""What a kernel is told of an attention: static choices, and arrays."""

from typing import NamedTuple

import jax


class How(NamedTuple):
    """Static choices. A score is cap·tanh(scale·q·k / cap) − slope·|i − j|, then masked."""

    causal: bool
    """A query sees keys of its own position and below."""
    window: int | None
    """Of those, only the last so many; with ``causal``."""
    prefix: bool
    """Keys at positions below ``Where.prefix`` are visible to every query; with ``causal``."""
    soft_cap: float | None
    scale: float


class Where(NamedTuple):
    """Arrays that place queries and keys, or None."""

    q_positions: jax.Array | None = None
    """int32 [B or 1, S]; None: ``q_offset`` + 0..S-1."""
    k_positions: jax.Array | None = None
    """int32 [B or 1, T]; None: ``k_offset`` + 0..T-1."""
    q_offset: jax.Array | int | None = None
    k_offset: jax.Array | int | None = None
    q_segments: jax.Array | None = None
    """int32 [B, S]; tokens attend within their own segment, 0 is padding."""
    k_segments: jax.Array | None = None
    """int32 [B, T]."""
    prefix: jax.Array | None = None
    """int32 [B]."""
    slopes: jax.Array | None = None
    """fp32 [N], of ALiBi."""
    sinks: jax.Array | None = None
    """fp32 [N]: a further logit in each head's softmax, with no value."""
