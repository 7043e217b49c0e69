"""Common parts of the GPU kernels: which blocks of keys each block of queries visits,
and the reverse, planned by XLA; and inside a kernel scores and their gradients, in
units of log2.

Blocks are judged by the least and greatest position and segment in them. Of the blocks
from the first that is not empty to the last, a kernel visits those that need no mask
(one run of them: ``full``), and with a mask the others, less one run of empty ones
(``gap``). A block that either run leaves out is masked, so that the result is exact
whatever the positions.
"""

from collections.abc import Callable, Container, Mapping
from math import log, log2
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.kernel_types import Index, Ref

LOG2E = log2(2.718281828459045)
LN2 = log(2)

FIELDS = 8
"""Integers of a block's :class:`BlockVisits` in the table."""
# Above every segment's id.
_FAR = 2**30


class BlockVisits(NamedTuple):
    """The visits of one block: scalars in a kernel. Masked visit t goes to
    :meth:`masked_block`."""

    masked_begin: jax.Array
    num_masked: jax.Array
    """Masked visits."""
    full_begin: jax.Array
    full_end: jax.Array
    first_gap_begin: jax.Array
    first_gap_length: jax.Array
    second_gap_begin: jax.Array
    second_gap_length: jax.Array

    @classmethod
    def read(cls, table: Ref, *at: Index) -> "BlockVisits":
        """Reads, in a kernel, the visits of a block from the table of
        :func:`plan_visits`."""
        fields = [table[(*at, field)] for field in range(FIELDS)]
        return cls(*fields)

    def masked_block(self, t: jax.Array) -> jax.Array:
        """Returns the block of masked visit t: ``masked_begin`` + t, past the gaps."""
        block = self.masked_begin + t
        first_gap = jnp.where(block >= self.first_gap_begin, self.first_gap_length, 0)
        block = block + first_gap
        second_gap = jnp.where(
            block >= self.second_gap_begin, self.second_gap_length, 0
        )
        return block + second_gap


def plan_visits(
    block_q: int,
    block_k: int,
    operands: AttentionOperands,
    params: AttentionParams,
    *,
    per_query: bool,
) -> jax.Array | None:
    """Returns the :class:`BlockVisits` of each block of queries to blocks of keys, or
    the reverse, int32 [B or 1, blocks, FIELDS]; None: all blocks are full. Offsets are
    those of ``operands`` (``params.merge_offsets``)."""
    S = operands.q.shape[1]
    T = operands.k.shape[1]
    # Slots past the last key are masked, but not where keys visit queries: they add to
    # no other key's gradient.
    padded = per_query and T % block_k > 0
    if not (params.causal or operands.q_segments is not None or padded):
        return None
    # bool [B or 1, blocks of queries, blocks of keys]: whether some query sees some
    # key, and whether every query sees every key.
    shape = 1, -(-S // block_q), -(-T // block_k)
    sees_some = jnp.ones(shape, bool)
    sees_all = jnp.ones(shape, bool)
    if params.causal:
        q_low, q_high = _positions(operands.q_offset, S, block_q)
        k_low, k_high = _positions(operands.k_offset, T, block_k)
        # Of queries along axis 1, of keys along axis 2.
        q_low = q_low[:, :, None]
        q_high = q_high[:, :, None]
        k_low = k_low[:, None]
        k_high = k_high[:, None]
        sees_some = q_high >= k_low
        sees_all = q_low >= k_high
        if params.window is not None:
            sees_some &= q_low - k_high < params.window
            sees_all &= q_high - k_low < params.window
        if operands.prefix is not None:
            prefix = operands.prefix[:, None, None]
            sees_some = sees_some | (k_low < prefix)
            sees_all = sees_all | (k_high < prefix)
    if operands.q_segments is not None:
        assert operands.k_segments is not None
        may_share, is_one = compare_block_segments(
            operands.q_segments, operands.k_segments, block_q, block_k
        )
        sees_some = sees_some & may_share
        sees_all = sees_all & is_one
    sees_all &= sees_some
    if not per_query:
        return _find_runs(sees_some.swapaxes(1, 2), sees_all.swapaxes(1, 2))
    inside = (jnp.arange(sees_all.shape[2]) + 1) * block_k <= T
    return _find_runs(sees_some, sees_all & inside)


def _positions(offset, length: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest position of each block, [1, blocks]."""
    low = jnp.arange(0, length, block, dtype=jnp.int32)[None]
    high = jnp.minimum(low + block, length) - 1
    offset = 0 if offset is None else offset
    return low + offset, high + offset


def _find_runs(sees_some: jax.Array, sees_all: jax.Array) -> jax.Array:
    """[B, n, m] → [B, n, FIELDS]. Reductions alone, which XLA fuses with what they
    reduce."""
    m = sees_some.shape[2]
    block = jnp.arange(m, dtype=jnp.int32)

    def find_first(which: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(which, block, m), axis=2)

    begin = find_first(sees_some)
    end = jnp.max(jnp.where(sees_some, block + 1, 0), axis=2)
    begin = jnp.minimum(begin, end)
    # The first run of full blocks, and the first run of empty ones.
    full_begin = jnp.minimum(find_first(sees_all), end)
    after_full = ~sees_all & (block >= full_begin[:, :, None])
    full_end = jnp.minimum(find_first(after_full), end)
    in_gap = ~sees_some & (block >= begin[:, :, None])
    gap_begin = jnp.minimum(find_first(in_gap), end)
    after_gap = sees_some & (block >= gap_begin[:, :, None])
    gap_end = jnp.minimum(find_first(after_gap), end)
    full_length = full_end - full_begin
    gap_length = gap_end - gap_begin
    # Masked visits pass over both, in order.
    full_is_first = full_begin <= gap_begin
    passed_over = [
        jnp.where(full_is_first, full_begin, gap_begin),
        jnp.where(full_is_first, full_length, gap_length),
        jnp.where(full_is_first, gap_begin, full_begin),
        jnp.where(full_is_first, gap_length, full_length),
    ]
    num_masked = end - begin - full_length - gap_length
    fields = [begin, num_masked, full_begin, full_end, *passed_over]
    return jnp.stack(fields, axis=2).astype(jnp.int32)


def compare_block_segments(
    q_segments: jax.Array, k_segments: jax.Array, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns bool [B, blocks of queries, blocks of keys]: whether they may have a
    segment in common; whether all their tokens are of one. Past the last token both are
    as if it went on."""
    q_bounds = _bounds(q_segments, block_q)
    q_least, q_low, q_high = (bound[:, :, None] for bound in q_bounds)
    k_bounds = _bounds(k_segments, block_k)
    k_least, k_low, k_high = (bound[:, None] for bound in k_bounds)
    is_one = (q_least == q_high) & (k_least == k_high) & (q_high == k_high)
    is_one = is_one & (k_least > 0)
    return (q_low <= k_high) & (k_low <= q_high), is_one


def split_into_blocks(x: jax.Array, size: int) -> jax.Array:
    """Splits [B, n] → [B, blocks, size], the last value repeated."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge")
    return x.reshape(x.shape[0], -1, size)


def _bounds(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each block's least segment, least that is not padding, and greatest."""
    cut = split_into_blocks(segments, size)
    real = jnp.where(cut > 0, cut, _FAR)
    return cut.min(axis=2), real.min(axis=2), cut.max(axis=2)


def list_mask_inputs(
    operands: AttentionOperands, params: AttentionParams
) -> dict[str, jax.Array]:
    """Lists by name what kernels read beside q, k and v. Offsets are those of
    ``operands`` (``params.merge_offsets``), as int32 [1]."""
    inputs: dict[str, jax.Array | None] = {}
    if params.causal or operands.slopes is not None:
        for name in ("q_offset", "k_offset"):
            offset = getattr(operands, name)
            inputs[name] = None if offset is None else offset[None]
    for name in ("q_segments", "k_segments", "prefix", "slopes"):
        inputs[name] = getattr(operands, name)
    return {name: x for name, x in inputs.items() if x is not None}


def has_linear_scores(params: AttentionParams, inputs: Container[str]) -> bool:
    """Whether scores are q·k times a positive number, so that the exponent scales them.
    ``inputs``: the names of the kernel's, or what has these as keys."""
    return params.soft_cap is None and "slopes" not in inputs and params.scale > 0


def get_exp2_scale(params: AttentionParams, inputs: Container[str]) -> float:
    """Returns the factor of :func:`scale_scores` before exp2."""
    return params.scale * LOG2E if has_linear_scores(params, inputs) else 1.0


def scale_scores(
    products: jax.Array,
    params: AttentionParams,
    refs: Mapping[str, Ref],
    head: jax.Array,
    behind: Callable[[], jax.Array],
    exp2: Callable[[jax.Array], jax.Array] = jnp.exp2,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns scores from q·k, of which exp2 is to be taken after
    :func:`get_exp2_scale`, and their derivative by scale·q·k; None: 1. ``behind`` gives
    queries' positions less keys'."""
    derivative = None
    if has_linear_scores(params, refs):
        return products, None
    if params.soft_cap is None:
        scores = products * (params.scale * LOG2E)
    else:
        # tanh(x) = 1 − 2 / (e^2x + 1): exact to fp32's step at 1, all that scores need.
        exponent_scale = 2 * LOG2E * params.scale / params.soft_cap
        tanh = 1 - 2 / (exp2(products * exponent_scale) + 1)
        scores = tanh * (params.soft_cap * LOG2E)
        derivative = 1 - tanh * tanh
    if "slopes" in refs:
        distance = jnp.abs(behind()).astype(jnp.float32)
        scores -= distance * (refs["slopes"][head] * LOG2E)
    return scores, derivative


def compute_weights_and_d_scores(
    scores: jax.Array,
    derivative: jax.Array | None,
    lse: jax.Array,
    d_weights: jax.Array,
    delta: jax.Array,
    mask: jax.Array | None,
    scale: float,
    exp2: Callable[[jax.Array], jax.Array] = jnp.exp2,
) -> tuple[jax.Array, jax.Array]:
    """Returns weights, and the gradient by scale·q·k (softmax's Jacobian). Masked keys
    and values may hold anything finite: d_weights may then not be.

    Args:
        scores, derivative: as :func:`scale_scores` returns them.
        lse: log2-sum-exps, +inf where there is no key.
        scale: :func:`get_exp2_scale`.
    """
    scores = scores * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = exp2(scores - lse)
    d_scores = weights * (d_weights - delta)
    if derivative is not None:
        d_scores *= derivative
    if mask is not None:
        # Infinity times a weight of 0 is NaN.
        d_scores = jnp.where(mask, d_scores, 0.0)
    return weights, d_scores
