"""The forward pass on a TPU: a block of queries, and all keys of its head in VMEM.

    keys →   ░ plain: one loop, a block a round       q block = 4 tiles of queries, each with
    ┌─────────────┬─────┐                             the keys of a block at a time: tile t+2's
    │░░░░░░░░░░░░░│◣    │  ◣ edge: a fixed list of    scores, tile t's softmax and tile t−1's
    │░░░░░░░░░░░░░│◣◣   │    tiles, as wide as the    values are neighbours in the program, so
    │░░░░░░░░░░░░░│◣◣◣  │    diagonal lets them be    that the matrix unit and the vector unit
    │░░░░░░░░░░░░░│◣◣◣◣ │                             work at once.
    └─────────────┴─────┘

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1). Tiles are
[keys, queries], as in the backward pass: what a query has one of lies along the lanes,
a tile's queries stay in the matrix unit while all of its keys pass through, and oᵀ =
vᵀ·pᵀ fills the unit where p·v would leave half of it idle. vᵀ has rows of ones on top:
the product's first rows are the sums of the weights. What goes from one stage to the
next is staged in VMEM by hand (``ProgramScalars.store_zero``): the compiler would
otherwise hold more than it has registers for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_blocks import LANES, SUBLANES, SUMS, TpuBlocks
from pallas_kernels.attention.tpu_scores import (
    LOG2_E,
    MASKED,
    KernelStatics,
    TilePosition,
    apply_slope_and_mask,
    interleave_stages,
    limit_in_flight,
    multiply,
    reshape_by_register,
    scale_scores_to_log2,
    transpose_ids_to_lanes,
)
from pallas_kernels.attention.walk import COLUMNS, KeyWalk, visit_key_blocks

# Keys whose weights are computed at once.
CHUNK = 16
# Keys of which a tile's stages take turns; and a product over more would be several
# that the compiler adds up, each in registers until the next one's end.
PIECE = 256
# Keys whose values are turned at once, at most.
TURNED = 4096
# A row's largest score before it has any.
NO_KEY = MASKED / 2


def forward_kernel(
    table, ints, floats, q_ref, k_ref, v_ref, q_ids, k_ids, o_ref, lse_ref,
    m, acc, vt, ids, scores, tops, fades, weights,
    *, walk: KeyWalk, statics: KernelStatics, blocks: TpuBlocks,
):  # fmt: skip
    """Computes one block of queries of one head.

    Args:
        table, ints, floats: scalars (:mod:`tpu`).
        q_ref, k_ref, v_ref: [bq, H], [T, H], [T, Hv]; q_ids, k_ids: int32 [1, bq], [1,
            T], or None.
        o_ref, lse_ref: [bq, Hv]; fp32 [1, bq].
        m: fp32 [SUBLANES, bq], a query's largest score so far.
        acc: fp32 [turned_rows(Hv), bq], SUMS rows of its sum of weights, and its output
            but for division by it.
        vt: [turned_rows(Hv), T], SUMS rows of ones, and the values turned.
        ids: int32 [bk, LANES], of the keys of a block, or None.
        scores, tops, fades: fp32, of each of a few tiles [1, keys, queries] and, in
            rows that are all the same but for tops, [1, SUBLANES, queries].
        weights: likewise [1, keys, queries] as v.
    """
    g, i = pl.program_id(1), pl.program_id(2)
    scalars = statics.read_program_scalars(ints, floats)
    params = statics.params
    put = scalars.store_zero
    get = scalars.load_zero
    slots = len(scores)
    Hv = v_ref.shape[1]
    # Above MASKED: what is masked weighs nothing, even before the first key that is
    # not.
    m_start = (
        jnp.maximum(scalars.sink * LOG2_E, NO_KEY) if statics.has_sinks else NO_KEY
    )

    @pl.when((g == 0) & (i == 0))
    def _():
        vt[:SUMS] = jnp.ones((SUMS, vt.shape[1]), vt.dtype)
        if len(vt) > SUMS + Hv:
            vt[SUMS + Hv :] = jnp.zeros((len(vt) - SUMS - Hv, vt.shape[1]), vt.dtype)
        step = _step(vt.shape[1], walk.bk)

        def turn(j, _):
            at = pl.ds(pl.multiple_of(j * step, walk.bk), step)
            vt[SUMS : SUMS + Hv, at] = v_ref[at].T
            return 0

        lax.fori_loop(0, vt.shape[1] // step, turn, 0)

    def start():
        m[...] = jnp.full(m.shape, m_start, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        if statics.has_sinks:
            acc[:SUMS] = jnp.ones((SUMS, walk.bq), jnp.float32)

    def pieces(tile):
        """Keys of a tile, by piece."""
        width = tile.k1 - tile.k0
        return [slice(a, min(a + PIECE, width)) for a in range(0, width, PIECE)]

    def keys(tile, j, piece):
        begin = j * walk.bk + tile.k0 + piece.start
        return pl.ds(pl.multiple_of(begin, LANES), piece.stop - piece.start)

    def score(n, tile, j, distance):
        slot = n % slots
        rows = slice(tile.q0, tile.q1)
        for piece in pieces(tile):
            at = keys(tile, j, piece)
            first = tile.k0 + piece.start
            s, _ = scale_scores_to_log2(multiply(k_ref[at], q_ref[rows], 1, 1), params)
            segments = None, None
            if tile.compares_segments:
                own = ids[first : first + len(s)]
                segments = q_ids[:, rows], jnp.tile(own, (1, s.shape[1] // LANES))
            spot = TilePosition(
                distance + tile.q0 - first, j * walk.bk + first, *segments
            )
            s = apply_slope_and_mask(s, tile.masked, spot, statics, scalars)
            scores[slot][put, piece] = s
            top = jnp.max(reshape_by_register(s), axis=0)
            if piece.start > 0:
                top = jnp.maximum(tops[slot][get], top)
            tops[slot][put] = top
            yield

    def softmax(n, tile, first):
        slot = n % slots
        rows = slice(tile.q0, tile.q1)
        top = jnp.max(tops[slot][get], axis=0, keepdims=True)
        before = m_start if first else m[:, rows]
        top = jnp.maximum(before, jnp.broadcast_to(top, (SUBLANES, top.shape[1])))
        m[:, rows] = top
        if not first or statics.has_sinks:
            fades[slot][put] = jnp.exp2(before - top)
        begun: list[jax.Array] = []
        for piece in pieces(tile):
            chunk = CHUNK if blocks.pace else piece.stop - piece.start
            for a in range(piece.start, piece.stop, chunk):
                at = slice(a, a + chunk)
                s = scores[slot][get, at]
                p = reshape_by_register(s) - limit_in_flight(top, begun, blocks.pace)
                p = jnp.exp2(p).reshape(s.shape)
                begun.append(p[:SUBLANES])
                weights[slot][put, at] = p.astype(vt.dtype)
            yield

    def values(n, tile, j, first, last):
        slot = n % slots
        rows = slice(tile.q0, tile.q1)
        for piece in pieces(tile):
            y = multiply(vt[:, keys(tile, j, piece)], weights[slot][get, piece], 1, 0)
            if piece.start > 0:
                y += acc[:, rows]
            elif not first:
                y += (reshape_by_register(acc[:, rows]) * fades[slot][get]).reshape(
                    y.shape
                )
            acc[:, rows] = y
            yield
        if first and statics.has_sinks:
            acc[:SUMS, rows] += jnp.tile(fades[slot][get], (SUMS // SUBLANES, 1))
        if last:
            write(rows)

    def write(rows):
        """The output of these queries, which have seen all of their keys."""
        total = _reciprocal(acc[:SUBLANES, rows], statics.interpret)
        o = (reshape_by_register(acc[SUMS:, rows]) * total).reshape(-1, total.shape[1])[
            :Hv
        ]
        o_ref[rows] = o.astype(o_ref.dtype).T

    def tiles(these, j, distance, first, last):
        if these[0].compares_segments:
            at = pl.ds(pl.multiple_of(j * walk.bk, walk.bk), walk.bk)
            ids[...] = transpose_ids_to_lanes(k_ids[:, at])
        interleave_stages(
            len(these),
            [
                (blocks.ahead, lambda n: score(n, these[n], j, distance)),
                (0, lambda n: softmax(n, these[n], first)),
                (-blocks.behind, lambda n: values(n, these[n], j, first, last)),
            ],
        )

    row = [
        table[(scalars.row if statics.num_tables > 1 else 0), i, c]
        for c in range(COLUMNS)
    ]
    visit_key_blocks(
        walk, row, i, scalars.qk_offset, start, tiles, lambda: write(slice(0, walk.bq))
    )
    top = m[:1]
    lse_ref[...] = jnp.where(top > NO_KEY, top / LOG2_E + jnp.log(acc[:1]), -jnp.inf)


def _step(keys: int, block: int) -> int:
    """Keys to turn at once: whole blocks that divide all keys, few enough for a loop's
    body."""
    blocks = keys // block
    most = max(TURNED // block, 1)
    return block * max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= most)


def _reciprocal(x: jax.Array, interpreted: bool) -> jax.Array:
    """1 / x of sums of weights, large where x is 0: the unit's guess and a step of
    Newton's, which is what the compiler makes of a division, but for the care that
    division takes of numbers that are no such sums. The interpreter's guess would be
    too coarse."""
    x = jnp.maximum(x, 1e-30)
    # jax 0.10 has it in pallas itself.
    unit: Any = pltpu if hasattr(pltpu, "reciprocal") else pl
    guess = unit.reciprocal(x, approx=not interpreted)
    return guess + guess * (1.0 - x * guess)
