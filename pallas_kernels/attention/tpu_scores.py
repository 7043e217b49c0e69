"""Scores of a tile inside a TPU kernel: scale, cap, slope and mask, in units of log2.

Softmax by powers of two: exp(x) = exp2(x · log2 e), and the factor joins the scale.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.params import AttentionParams
from pallas_kernels.attention.tpu_blocks import LANES, SUBLANES
from pallas_kernels.kernel_types import Index, Ref

# A masked score. Finite, so that a row with every key masked gives no NaN on the way to
# its zeros.
MASKED = -1e30
# No score is as large.
_HUGE = 3e38
_DONE = object()
LOG2_E = math.log2(math.e)


class KernelStatics(NamedTuple):
    """Static facts of a call, the same for all of its tiles."""

    params: AttentionParams
    kv_heads: int
    group: int
    """Query heads a kv head."""
    qk_offset: int | None
    """Position of the first query less that of the first key; None: ``ints[0]``."""
    num_keys: int | None
    """Keys that are no padding; None: all."""
    num_tables: int
    """Rows of the batch with a table of their own, or 1."""
    has_prefix: bool
    has_slopes: bool
    has_sinks: bool
    interpret: bool = False
    """Whether Pallas's interpreter runs the kernel, not a TPU."""

    def read_program_scalars(self, int_ref: Ref, float_ref: Ref) -> "ProgramScalars":
        """Reads, in a kernel, this grid step's scalars (kv heads of all rows, group,
        ...)."""
        kv_head = pl.program_id(0)
        member = pl.program_id(1)
        row = lax.div(kv_head, self.kv_heads)
        head = lax.rem(kv_head, self.kv_heads) * self.group + member
        return ProgramScalars(
            row=row,
            qk_offset=int_ref[0] if self.qk_offset is None else self.qk_offset,
            store_zero=int_ref[1],
            load_zero=int_ref[2],
            prefix=int_ref[3 + row] if self.has_prefix else None,
            slope=float_ref[0, head] if self.has_slopes else None,
            sink=float_ref[1, head] if self.has_sinks else None,
        )


class ProgramScalars(NamedTuple):
    """A grid step's scalars."""

    row: jax.Array
    """Row of the batch."""
    qk_offset: Index
    store_zero: jax.Array
    load_zero: jax.Array
    """Zeros, which the compiler does not know: what is stored at [store_zero] it must
    read back at [load_zero]. Were both the same to it, values would stay in registers
    between the stages of a tile, until there are too many and it spills them at the
    wrong time."""
    prefix: jax.Array | None
    """Keys that every query sees."""
    slope: jax.Array | None
    sink: jax.Array | None


def interleave_stages(
    count: int, stages: Sequence[tuple[int, Callable[[int], Iterator[None]]]]
) -> None:
    """Runs every stage for each of ``count`` tiles, a stage of (ahead, function) so
    many tiles before the one with 0. Neighbours in the program overlap on the machine:
    the stages that run together take turns, each as far as its next ``yield``."""
    most_ahead = max(ahead for ahead, _ in stages)
    least_ahead = min(ahead for ahead, _ in stages)
    for n in range(-most_ahead, count - least_ahead):
        running = []
        for ahead, stage in stages:
            tile = n + ahead
            if 0 <= tile < count:
                running.append(stage(tile))
        while running:
            running = [stage for stage in running if next(stage, _DONE) is not _DONE]


class TilePosition(NamedTuple):
    """Place of a tile."""

    qk_offset: Index
    """Position of its first query less that of its first key."""
    k_start: Index
    """Index of its first key."""
    q_segments: jax.Array | None
    """Ids, broadcast against ``k_segments``; −1 sees nothing."""
    k_segments: jax.Array | None


def multiply(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Multiplies over one axis of each, in fp32; fp32 operands are not rounded to
    bf16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def scale_scores_to_log2(
    products: jax.Array, params: AttentionParams
) -> tuple[jax.Array, jax.Array | None]:
    """Scales fp32 q · k to scores · log2 e; also gives a cap's derivative by
    scale·q·k."""
    if params.soft_cap is None:
        return products * (params.scale * LOG2_E), None
    # cap · tanh(scale · q·k / cap), whose derivative by scale · q·k is 1 − tanh².
    tanh = jnp.tanh(products * (params.scale / params.soft_cap))
    scores = tanh * (params.soft_cap * LOG2_E)
    return scores, 1.0 - tanh * tanh


def limit_in_flight(x: jax.Array, started: list[jax.Array], pace: int) -> jax.Array:
    """Returns x, but where ``pace`` chunks of weights are ``started``, not before the
    first of them is known, and drops that: otherwise differences that the unit of
    exponentials has no time for yet would wait in registers.

    Args:
        x: fp32 [SUBLANES, queries], a multiple of LANES.
        started: of each chunk weights of the same queries, as x.
        pace: 0: x as it is.
    """
    if not pace or len(started) < pace:
        return x
    earlier = jnp.tile(started.pop(0)[:, :LANES], (1, x.shape[1] // LANES))
    # The sum is always larger: the compiler does not know, and waits.
    return jnp.minimum(x, earlier + _HUGE)


def reshape_by_register(x: jax.Array) -> jax.Array:
    """Reshapes [n, m] as [n / SUBLANES, SUBLANES, m]."""
    return x.reshape(-1, SUBLANES, x.shape[1])


def transpose_ids_to_lanes(ids: jax.Array) -> jax.Array:
    """Returns [1, keys] as [keys, LANES]."""
    return jnp.broadcast_to(ids, (LANES, ids.shape[1])).T


def apply_slope_and_mask(
    scores: jax.Array,
    masked: bool,
    position: TilePosition,
    statics: KernelStatics,
    scalars: ProgramScalars,
) -> jax.Array:
    """Gives scores [keys, queries] ALiBi's slope (Press et al. 2022), and MASKED where
    a query may not see a key: by its position, if ``masked``, and by its segment, where
    the spot has these.

    A register's worth of keys at a time, so that positions are compared with numbers:
    positions of a whole tile would be the same for many tiles, and wait for them in
    registers.
    """
    if not masked and not statics.has_slopes and position.q_segments is None:
        return scores
    shape = SUBLANES, scores.shape[1]
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    behind = lax.broadcasted_iota(jnp.int32, shape, 1) - key
    rows = []
    for first in range(0, len(scores), SUBLANES):
        register_keys = slice(first, first + SUBLANES)
        row = scores[register_keys]
        offset = position.qk_offset - first
        if scalars.slope is not None:
            distance = jnp.abs(behind + offset).astype(jnp.float32)
            row = row - distance * (scalars.slope * LOG2_E)
        conditions = []
        if position.k_segments is not None:
            k_segments = position.k_segments[register_keys]
            conditions.append(position.q_segments == k_segments)
        if masked:
            conditions += _compare_positions(
                behind, key, offset, position.k_start + first, statics, scalars
            )
        if conditions:
            row = jnp.where(reduce(and_, conditions), row, MASKED)
        rows.append(row)
    return jnp.concatenate(rows, axis=0)


def _compare_positions(
    behind: jax.Array,
    key: jax.Array,
    offset: Index,
    first_key: Index,
    statics: KernelStatics,
    scalars: ProgramScalars,
) -> list[jax.Array]:
    """Returns the conditions, all of which hold where a query sees a key, by positions.

    Args:
        behind: of each query and key, the query's position less the key's, less
            ``offset``.
        key: of each key, its index less ``first_key``.
    """
    params = statics.params
    conditions = []
    if params.causal:
        visible = behind >= -offset
        if params.window is not None:
            visible &= behind < params.window - offset
        if scalars.prefix is not None:
            visible |= key < scalars.prefix - first_key
        conditions.append(visible)
    if statics.num_keys is not None:
        conditions.append(key < statics.num_keys - first_key)
    return conditions
