"""The forward pass on a TPU: a block of queries, and all keys of its head in VMEM.

    keys →   ░ plain: one loop, a block a round       q block = 4 tiles of queries, each with
    ┌─────────────┬─────┐                             the keys of a block at a time;
    │░░░░░░░░░░░░░│◣    │  ◣ edge: a fixed list of    tile t+1's q·kᵀ is issued before tile
    │░░░░░░░░░░░░░│◣◣   │    tiles, as wide as the    t's softmax, so that the matrix unit
    │░░░░░░░░░░░░░│◣◣◣  │    diagonal lets them be    and the vector unit work at once.
    │░░░░░░░░░░░░░│◣◣◣◣ │
    └─────────────┴─────┘

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1), with the denominator kept
as 128 partial sums, one a lane, which are added up once at the end. Scores, weights and factors of
a tile are staged in VMEM by hand (``Scalars.put``): the compiler would otherwise hold more than it
has registers for.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_blocks import LANES, Blocks
from pallas_kernels.attention.tpu_scores import (
    LOG2_E,
    MASKED,
    Setting,
    Spot,
    placed,
    product,
    scaled,
    stages,
)
from pallas_kernels.attention.walk import COLUMNS, Walk, mixed, visit

# Keys whose weights are computed at once.
CHUNK = 256
# A row's largest score before it has any.
NO_KEY = MASKED / 2


def kernel(
    table, ints, floats, q_ref, k_ref, v_ref, q_ids, k_ids, o_ref, lse_ref,
    m, l, acc, scores, tops, fades, weights, ids,
    *, walk: Walk, setting: Setting, blocks: Blocks,
):  # fmt: skip
    """One block of queries of one head.

    Args:
        table, ints, floats: scalars (:mod:`tpu`).
        q_ref, k_ref, v_ref: [bq, H], [T, H], [T, Hv]; q_ids, k_ids: int32 [1, bq], [1, T], or None.
        o_ref, lse_ref: [bq, Hv]; fp32 [1, bq].
        m, l: fp32 [bq, LANES], a row's largest score so far, and lanes' sums of exponentials.
        acc: fp32 [bq, Hv], the output but for division by the sum.
        scores, tops, fades: fp32, of each of a few tiles [1, tile, keys], and [1, tile, LANES].
        weights: likewise [1, tile, keys] as v, or None: not staged.
        ids: int32 [bq, LANES], or None.
    """
    i = pl.program_id(2)
    scalars = setting.scalars(ints, floats)
    # Above MASKED: what is masked weighs nothing, even before the first key that is not.
    m_start = jnp.maximum(scalars.sink * LOG2_E, NO_KEY) if setting.sinks else NO_KEY

    def l_start(rows):
        if not setting.sinks:
            return jnp.zeros((rows, LANES), jnp.float32)
        return (lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) == 0).astype(jnp.float32)

    def start():
        m[...] = jnp.full(m.shape, m_start, jnp.float32)
        l[...] = l_start(walk.bq)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    row = [table[(scalars.row if setting.tables > 1 else 0), i, c] for c in range(COLUMNS)]
    if q_ids is not None:

        @pl.when(mixed(row))
        def _():
            ids[...] = jnp.broadcast_to(q_ids[...], (LANES, walk.bq)).T

    slots = len(scores)
    put, get = (scalars.put, scalars.get) if blocks.staged else (0, 0)

    def keys(tile, j):
        return pl.ds(pl.multiple_of(j * walk.bk + tile.k0, LANES), tile.k1 - tile.k0)

    def score(n, tile, j, distance):
        slot, width = n % slots, tile.k1 - tile.k0
        s = product(q_ref[tile.q0 : tile.q1], k_ref[keys(tile, j)], 1, 1)
        s, _ = scaled(s, setting.how)
        segments = None, None
        if tile.packed:
            own = jnp.tile(ids[tile.q0 : tile.q1], (1, width // LANES))
            segments = own, k_ids[:, keys(tile, j)]
        spot = Spot(distance + tile.q0 - tile.k0, j * walk.bk + tile.k0, *segments)
        s = placed(s, tile.masked, spot, setting, scalars, 0)
        scores[slot][put, :, :width] = s
        tops[slot][put] = reduce(jnp.maximum, (s[:, a : a + LANES] for a in range(0, width, LANES)))

    def softmax(n, tile, j, first, last):
        slot, width = n % slots, tile.k1 - tile.k0
        rows = slice(tile.q0, tile.q1)
        top = jnp.max(tops[slot][get], axis=1, keepdims=True)
        if first:
            top = jnp.broadcast_to(jnp.maximum(top, m_start), tops[slot].shape[1:])
            total = l_start(len(top))
            total = jnp.exp2(m_start - top) * total if setting.sinks else total
        else:
            before = m[rows]
            top = jnp.maximum(before, top)
            fades[slot][put] = fade = jnp.exp2(before - top)
            total = fade * l[rows]
        parts = []
        for a in range(0, width, CHUNK):
            b = min(a + CHUNK, width)
            p = jnp.exp2(scores[slot][get, :, a:b] - _spread(top, b - a))
            total = reduce(jnp.add, (p[:, c : c + LANES] for c in range(0, b - a, LANES)), total)
            p = p.astype(v_ref.dtype)
            if weights is None:
                parts.append(p)
            else:
                weights[slot][put, :, a:b] = p
        p = jnp.concatenate(parts, axis=1) if weights is None else weights[slot][get, :, :width]
        y = product(p, v_ref[keys(tile, j)], 1, 0)
        if last:
            # Other tiles' products go on meanwhile; registers would not hold both.
            if blocks.staged and y.shape[1] <= walk.bk:
                fades[slot][put], scores[slot][put, :, : y.shape[1]] = total, y
                total, y = fades[slot][get], scores[slot][get, :, : y.shape[1]]
            m[rows], (l[rows], o_ref[rows]) = top, divided(total, y)
            return
        m[rows], l[rows] = top, total
        acc[rows] = y if first else acc[rows] * _spread(fades[slot][get], acc.shape[1]) + y

    def divided(total, y):
        """Sums of all lanes, in each; and the output."""
        total = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
        y *= _spread(_reciprocal(total, setting.interpreted), y.shape[1])
        return total, y.astype(o_ref.dtype)

    def tiles(these, j, distance, first, last):
        stages(
            len(these),
            [
                (blocks.ahead, lambda n: score(n, these[n], j, distance)),
                (0, lambda n: softmax(n, these[n], j, first, last)),
            ],
        )

    def finish():
        l[...], o_ref[...] = divided(l[...], acc[...])

    visit(walk, row, i, scalars.shift, start, tiles, finish)

    for a in range(0, walk.bq, LANES):
        at = slice(a, a + LANES)
        row_top, row_total = _row(m[at]), _row(l[at])
        lse_ref[:, at] = jnp.where(
            row_top > NO_KEY, row_top / LOG2_E + jnp.log(row_total), -jnp.inf
        )


def _reciprocal(x: jax.Array, interpreted: bool) -> jax.Array:
    """1 / x of sums of weights, large where x is 0: the unit's guess and a step of Newton's, which
    is what the compiler makes of a division, but for the care that division takes of numbers that
    are no such sums. The interpreter's guess would be too coarse."""
    x = jnp.maximum(x, 1e-30)
    # jax 0.10 has it in pallas itself.
    unit: Any = pltpu if hasattr(pltpu, "reciprocal") else pl
    guess = unit.reciprocal(x, approx=not interpreted)
    return guess + guess * (1.0 - x * guess)


def _row(x: jax.Array) -> jax.Array:
    """[LANES, LANES] of equal lanes as [1, LANES]: cheaper than to transpose it."""
    a, b = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(a == b, x, 0.0), axis=0, keepdims=True)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[R, LANES] of equal lanes as [R, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
