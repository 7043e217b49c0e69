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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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
from pallas_kernels.attention.walk import COLUMNS, Walk, visit

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
    if setting.sinks:
        m[...] = jnp.full(m.shape, jnp.maximum(scalars.sink * LOG2_E, NO_KEY), jnp.float32)
        l[...] = (lax.broadcasted_iota(jnp.int32, l.shape, 1) == 0).astype(jnp.float32)
    else:
        m[...] = jnp.full(m.shape, NO_KEY, jnp.float32)
        l[...] = jnp.zeros(l.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    if q_ids is not None:
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
        if q_ids is not None and tile.masked:
            own = jnp.tile(ids[tile.q0 : tile.q1], (1, width // LANES))
            segments = own, k_ids[:, keys(tile, j)]
        spot = Spot(distance + tile.q0 - tile.k0, j * walk.bk + tile.k0, *segments)
        s = placed(s, tile.masked, spot, setting, scalars, 0)
        scores[slot][put, :, :width] = s
        tops[slot][put] = reduce(jnp.maximum, (s[:, a : a + LANES] for a in range(0, width, LANES)))

    def softmax(n, tile, j):
        slot, width = n % slots, tile.k1 - tile.k0
        rows = slice(tile.q0, tile.q1)
        before = m[rows]
        top = jnp.maximum(before, jnp.max(tops[slot][get], axis=1, keepdims=True))
        fade = jnp.exp2(before - top)
        total, parts = fade * l[rows], []
        for a in range(0, width, CHUNK):
            b = min(a + CHUNK, width)
            p = jnp.exp2(scores[slot][get, :, a:b] - _spread(top, b - a))
            total = reduce(jnp.add, (p[:, c : c + LANES] for c in range(0, b - a, LANES)), total)
            p = p.astype(v_ref.dtype)
            if weights is None:
                parts.append(p)
            else:
                weights[slot][put, :, a:b] = p
        m[rows], l[rows], fades[slot][put] = top, total, fade
        p = jnp.concatenate(parts, axis=1) if weights is None else weights[slot][get, :, :width]
        y = product(p, v_ref[keys(tile, j)], 1, 0)
        acc[rows] = acc[rows] * _spread(fades[slot][get], acc.shape[1]) + y

    def tiles(these, j, distance):
        stages(
            len(these),
            [
                (blocks.ahead, lambda n: score(n, these[n], j, distance)),
                (0, lambda n: softmax(n, these[n], j)),
            ],
        )

    row = [table[(scalars.row if setting.tables > 1 else 0), i, c] for c in range(COLUMNS)]
    visit(walk, row, i, scalars.shift, tiles)

    top, total = m[...], jnp.sum(l[...], axis=1, keepdims=True)
    some = top > NO_KEY  # rows that saw a key
    o_ref[...] = (acc[...] * _spread(jnp.where(some, 1.0 / total, 0.0), acc.shape[1])).astype(
        o_ref.dtype
    )
    lse_ref[...] = jnp.where(some, top / LOG2_E + jnp.log(total), -jnp.inf).T[:1]


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[R, LANES] of equal lanes as [R, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
