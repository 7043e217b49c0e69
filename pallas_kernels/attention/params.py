"""Parameters and operands of an attention, and their checks."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Segments = tuple[jax.Array, jax.Array]
Offset = int | jax.Array


class AttentionParams(NamedTuple):
    """Static choices. A score is cap·tanh(scale·q·k / cap) − slope·|i − j| + bias[j − i], then
    masked."""

    causal: bool
    """A query sees keys of its own position and below, and the prefix."""
    window: int | None
    """Of those, only the last so many, and the prefix; with ``causal``."""
    soft_cap: float | None
    scale: float
    q_offset: int = 0
    """The first query's position, as far as it is static; ``AttentionOperands.q_offset`` adds."""
    k_offset: int = 0


class AttentionOperands(NamedTuple):
    """Arrays that place queries and keys, or None."""

    q_positions: jax.Array | None = None
    """int32 [B or 1, S]; None: offset + 0..S-1."""
    k_positions: jax.Array | None = None
    """int32 [B or 1, T]; None: offset + 0..T-1."""
    q_offset: jax.Array | None = None
    """int32 scalar, where it is traced; None: ``AttentionParams.q_offset`` alone."""
    k_offset: jax.Array | None = None
    q_segments: jax.Array | None = None
    """int32 [B, S]; tokens attend within their own segment, 0 is padding."""
    k_segments: jax.Array | None = None
    """int32 [B, T]; there where ``q_segments`` is."""
    prefix: jax.Array | None = None
    """int32 [B]: keys at positions below are visible to every query; with ``causal``."""
    slopes: jax.Array | None = None
    """fp32 [N]: of the linear biases."""
    sinks: jax.Array | None = None
    """fp32 [N]: a further logit in each head's softmax, with no value. Only a forward pass reads
    it: log-sum-exps hold it afterwards."""
    biases: jax.Array | None = None
    """fp32 [N, 2R + 1]: learned, of keys R or more before a query, .., R or more after it."""


def validate_arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: jax.Array | None = None,
    q_offset: Offset = 0,
    k_offset: Offset = 0,
    q_positions: jax.Array | None = None,
    k_positions: jax.Array | None = None,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    biases: jax.Array | None = None,
) -> tuple[AttentionOperands, AttentionParams]:
    """Checks the arguments of :func:`~pallas_kernels.attention.attention` and returns them in two
    parts.

    Raises:
        ValueError: as there.
    """
    (B, S, N, _), T = _sizes(q, k, v), k.shape[1]
    wide = wide_type(q)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window} with causal={causal}: windows look back, 1 key or more")
    if prefix is not None and not causal:
        raise ValueError("a prefix without causal: every query sees every key already")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be above 0")
    q_segments, k_segments = segment_ids or (None, None)
    static_q, traced_q = _offset("q", q_offset, q_positions)
    static_k, traced_k = _offset("k", k_offset, k_positions)
    operands = AttentionOperands(
        _array("q_positions", q_positions, jnp.int32, (B, S), (1, S)),
        _array("k_positions", k_positions, jnp.int32, (B, T), (1, T)),
        traced_q,
        traced_k,
        _array("segment_ids of queries", q_segments, jnp.int32, (B, S)),
        _array("segment_ids of keys", k_segments, jnp.int32, (B, T)),
        _array("prefix", prefix, jnp.int32, (B,)),
        _array("slopes", slopes, wide, (N,)),
        _array("sinks", sinks, wide, (N,)),
        _biases(biases, N, wide),
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return operands, AttentionParams(causal, window, soft_cap, scale, static_q, static_k)


def wide_type(*operands: jax.Array) -> Any:
    """Returns the dtype of scores and sums: fp32, or float64 where operands are."""
    return jnp.result_type(*operands, jnp.float32)


def sum_offsets(static: int, traced: jax.Array | None) -> Offset:
    """Returns the sum of an offset's static and traced part; an int where it is static."""
    return static if traced is None else static + traced


def merge_offsets(operands: AttentionOperands, params: AttentionParams) -> AttentionOperands:
    """Moves static offsets into the operands' arrays, for kernels that read them there: without a
    prefix or positions one by one, which are counted from 0, only as far as queries' and keys'
    differ."""
    q_offset, k_offset = params.q_offset, params.k_offset
    if all(x is None for x in (operands.q_positions, operands.k_positions, operands.prefix)):
        q_offset, k_offset = q_offset - k_offset, 0

    def whole(static: int, traced: jax.Array | None) -> jax.Array | None:
        return jnp.asarray(sum_offsets(static, traced), jnp.int32) if static else traced

    return operands._replace(
        q_offset=whole(q_offset, operands.q_offset), k_offset=whole(k_offset, operands.k_offset)
    )


def _sizes(q, k, v) -> tuple[int, int, int, int]:
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes} are not [batch, sequence, heads, head size] each")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes} do not belong together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} kv heads")
    return q.shape


def _offset(side: str, offset: Any, positions: Any) -> tuple[int, jax.Array | None]:
    """Splits an offset into its static and its traced part."""
    if isinstance(offset, (int, np.integer)):
        static, traced = int(offset), None
    else:
        static, traced = 0, jnp.asarray(offset)
        if traced.shape or not jnp.issubdtype(traced.dtype, jnp.integer):
            raise ValueError(f"{side}_offset is {traced.dtype} {traced.shape}, not an int scalar")
        traced = traced.astype(jnp.int32)
    if positions is not None and (static or traced is not None):
        raise ValueError(f"{side}_offset beside {side}_positions: positions are whole already")
    return static, traced


def _biases(x: Any, N: int, dtype: Any) -> jax.Array | None:
    if x is None:
        return None
    shape = jnp.shape(x)
    if len(shape) != 2 or shape[0] != N or shape[1] % 2 == 0:
        raise ValueError(f"biases of shape {shape}: these sizes want ({N}, an odd number)")
    return jnp.asarray(x, dtype)


def _array(name: str, x: Any, dtype: Any, *shapes: tuple[int, ...]) -> jax.Array | None:
    if x is None:
        return None
    if jnp.shape(x) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} of shape {jnp.shape(x)}: these sizes want {wanted}")
    return jnp.asarray(x, dtype)
