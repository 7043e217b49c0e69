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
from pallas_kernels.chips import find_largest_divisor
from pallas_kernels.kernel_types import Ref

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
    table: Ref,
    ints: Ref,
    floats: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    q_ids: Ref | None,
    k_ids: Ref | None,
    o_ref: Ref,
    lse_ref: Ref,
    top_ref: Ref,
    acc_ref: Ref,
    vt_ref: Ref,
    block_ids: Ref | None,
    scores: list[Ref],
    tops: list[Ref],
    decays: list[Ref],
    weights: list[Ref],
    *,
    walk: KeyWalk,
    statics: KernelStatics,
    blocks: TpuBlocks,
) -> None:
    """Computes one block of queries of one head.

    Args:
        table, ints, floats: scalars (:mod:`tpu`).
        q_ref, k_ref, v_ref: [bq, H], [T, H], [T, Hv]; q_ids, k_ids: int32 [1, bq], [1,
            T], or None.
        o_ref, lse_ref: [bq, Hv]; fp32 [1, bq].
        top_ref: fp32 [SUBLANES, bq], a query's largest score so far.
        acc_ref: fp32 [turned rows, bq], SUMS rows of its sum of weights, and its output
            but for division by it; :func:`count_value_and_sum_rows`.
        vt_ref: [turned rows, T], SUMS rows of ones, and the values turned.
        block_ids: int32 [bk, LANES], of the keys of a block, or None.
        scores, tops, decays: fp32, of each of a few tiles [1, keys, queries] and, in
            rows that are all the same but for tops, [1, SUBLANES, queries].
        weights: likewise [1, keys, queries] as v.
    """
    # The grid: kv heads of all rows, query heads of one, blocks of queries.
    member = pl.program_id(1)
    i = pl.program_id(2)
    scalars = statics.read_program_scalars(ints, floats)
    params = statics.params
    # Both are 0, and the compiler does not know (`ProgramScalars`).
    store_at = scalars.store_zero
    load_at = scalars.load_zero
    slots = len(scores)
    Hv = v_ref.shape[1]
    # Above MASKED: what is masked weighs nothing, even before the first key that is
    # not.
    first_top = NO_KEY
    if scalars.sink is not None:
        first_top = jnp.maximum(scalars.sink * LOG2_E, NO_KEY)

    # A kv head's values are turned once, and stay for all of its queries.
    @pl.when((member == 0) & (i == 0))
    def turn_values():
        num_rows, num_keys = vt_ref.shape
        vt_ref[:SUMS] = jnp.ones((SUMS, num_keys), vt_ref.dtype)
        padding = num_rows - SUMS - Hv
        if padding > 0:
            vt_ref[SUMS + Hv :] = jnp.zeros((padding, num_keys), vt_ref.dtype)
        step = _count_keys_turned_at_once(num_keys, walk.bk)

        def turn(j, _):
            keys = pl.ds(pl.multiple_of(j * step, walk.bk), step)
            vt_ref[SUMS : SUMS + Hv, keys] = v_ref[keys].T
            return 0

        lax.fori_loop(0, num_keys // step, turn, 0)

    def start():
        top_ref[...] = jnp.full(top_ref.shape, first_top, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        if statics.has_sinks:
            # As if a key with the sink's score had come first, and a value of zeros.
            acc_ref[:SUMS] = jnp.ones((SUMS, walk.bq), jnp.float32)

    def list_pieces(tile):
        """Keys of a tile, by piece."""
        width = tile.k1 - tile.k0
        return [
            slice(begin, min(begin + PIECE, width)) for begin in range(0, width, PIECE)
        ]

    def get_keys(tile, j, piece):
        begin = j * walk.bk + tile.k0 + piece.start
        return pl.ds(pl.multiple_of(begin, LANES), piece.stop - piece.start)

    # The three stages of tile n, which leave what they find in its slot.

    def score(n, tile, j, distance):
        """Scores and, of each register's place, their largest."""
        slot = n % slots
        queries = slice(tile.q0, tile.q1)
        for piece in list_pieces(tile):
            keys = get_keys(tile, j, piece)
            first_key = tile.k0 + piece.start
            products = multiply(k_ref[keys], q_ref[queries], 1, 1)
            score, _ = scale_scores_to_log2(products, params)
            q_segments = None
            k_segments = None
            if tile.compares_segments:
                assert q_ids is not None
                assert block_ids is not None
                piece_ids = block_ids[first_key : first_key + len(score)]
                q_segments = q_ids[:, queries]
                k_segments = jnp.tile(piece_ids, (1, score.shape[1] // LANES))
            position = TilePosition(
                distance + tile.q0 - first_key,
                j * walk.bk + first_key,
                q_segments,
                k_segments,
            )
            score = apply_slope_and_mask(score, tile.masked, position, statics, scalars)
            scores[slot][store_at, piece] = score
            top = jnp.max(reshape_by_register(score), axis=0)
            if piece.start > 0:
                top = jnp.maximum(tops[slot][load_at], top)
            tops[slot][store_at] = top
            yield

    def weigh(n, tile, is_first):
        """Weights by the largest score so far, and by how much earlier sums decay."""
        slot = n % slots
        queries = slice(tile.q0, tile.q1)
        tile_top = jnp.max(tops[slot][load_at], axis=0, keepdims=True)
        old_top = first_top if is_first else top_ref[:, queries]
        tile_top = jnp.broadcast_to(tile_top, (SUBLANES, tile_top.shape[1]))
        top = jnp.maximum(old_top, tile_top)
        top_ref[:, queries] = top
        if not is_first or statics.has_sinks:
            decays[slot][store_at] = jnp.exp2(old_top - top)
        started: list[jax.Array] = []
        for piece in list_pieces(tile):
            size = CHUNK if blocks.pace else piece.stop - piece.start
            for begin in range(piece.start, piece.stop, size):
                chunk = slice(begin, begin + size)
                score = scores[slot][load_at, chunk]
                score_registers = reshape_by_register(score)
                paced_top = limit_in_flight(top, started, blocks.pace)
                exponent = score_registers - paced_top
                weight = jnp.exp2(exponent).reshape(score.shape)
                started.append(weight[:SUBLANES])
                weights[slot][store_at, chunk] = weight.astype(vt_ref.dtype)
            yield

    def add_values(n, tile, j, is_first, is_last):
        """Adds vᵀ·pᵀ, of the sums of weights too, to what has decayed."""
        slot = n % slots
        queries = slice(tile.q0, tile.q1)
        for piece in list_pieces(tile):
            keys = get_keys(tile, j, piece)
            y = multiply(vt_ref[:, keys], weights[slot][load_at, piece], 1, 0)
            if piece.start > 0:
                y += acc_ref[:, queries]
            elif not is_first:
                earlier = reshape_by_register(acc_ref[:, queries])
                decayed = earlier * decays[slot][load_at]
                y += decayed.reshape(y.shape)
            acc_ref[:, queries] = y
            yield
        if is_first and statics.has_sinks:
            # The sink's weight is 1 before it decays.
            sink_weight = jnp.tile(decays[slot][load_at], (SUMS // SUBLANES, 1))
            acc_ref[:SUMS, queries] += sink_weight
        if is_last:
            write(queries)

    def write(queries):
        """The output of these queries, which have seen all of their keys."""
        inverse = _reciprocal(acc_ref[:SUBLANES, queries], statics.interpret)
        o = reshape_by_register(acc_ref[SUMS:, queries]) * inverse
        o = o.reshape(-1, inverse.shape[1])[:Hv]
        o_ref[queries] = o.astype(o_ref.dtype).T

    # The walk over blocks of keys: their tiles, in overlapping stages.

    def run_tiles(tiles, j, distance, is_first, is_last):
        if tiles[0].compares_segments:
            assert k_ids is not None
            assert block_ids is not None
            keys = pl.ds(pl.multiple_of(j * walk.bk, walk.bk), walk.bk)
            block_ids[...] = transpose_ids_to_lanes(k_ids[:, keys])
        interleave_stages(
            len(tiles),
            [
                (blocks.ahead, lambda n: score(n, tiles[n], j, distance)),
                (0, lambda n: weigh(n, tiles[n], is_first)),
                (
                    -blocks.behind,
                    lambda n: add_values(n, tiles[n], j, is_first, is_last),
                ),
            ],
        )

    def finish():
        write(slice(0, walk.bq))

    table_row = scalars.row if statics.num_tables > 1 else 0
    row = [table[table_row, i, column] for column in range(COLUMNS)]
    visit_key_blocks(walk, row, i, scalars.qk_offset, start, run_tiles, finish)

    # log-sum-exps, in natural units; −inf where there is neither key nor sink.
    top = top_ref[:1]
    has_key_or_sink = top > NO_KEY
    lse = top / LOG2_E + jnp.log(acc_ref[:1])
    lse_ref[...] = jnp.where(has_key_or_sink, lse, -jnp.inf)


def _count_keys_turned_at_once(num_keys: int, block: int) -> int:
    """Counts keys of a loop's round: whole blocks that divide all keys, few enough for
    the loop's body."""
    num_blocks = num_keys // block
    most_blocks = max(TURNED // block, 1)
    return block * find_largest_divisor(num_blocks, most_blocks)


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
