"""The backward pass on a TPU: one kernel for dQ, dK and dV (Dao et al. 2022, algorithm
4).

A block of queries walks through the keys of its head as in the forward pass. Its dQ is
summed meanwhile, dK and dV over all queries that share the kv head, in VMEM; every
score is computed once. Tiles are [keys, queries]: then each row vector (log-sum-exp,
delta) lies along the lanes, and of the five products only dQᵀ = Kᵀ·dSᵀ has an operand
to turn, the small one.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.tpu_blocks import LANES, SUBLANES, TpuBlocks
from pallas_kernels.attention.tpu_scores import (
    LOG2_E,
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
from pallas_kernels.kernel_types import Ref

# Keys whose weights are computed at once.
CHUNK = 32


def backward_kernel(
    table: Ref,
    ints: Ref,
    floats: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    q_ids: Ref | None,
    k_ids: Ref | None,
    dq_in: Ref | None,
    dk_in: Ref | None,
    dv_in: Ref | None,
    dq_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    dq_sum: Ref,
    dk_sum: Ref,
    dv_sum: Ref,
    scores: list[Ref],
    d_weights: list[Ref],
    derivatives: list[Ref] | None,
    weights: list[Ref],
    d_scores: list[Ref],
    *,
    walk: KeyWalk,
    statics: KernelStatics,
    blocks: TpuBlocks,
) -> None:
    """Computes one block of queries of one head.

    Args:
        table, ints, floats: scalars (:mod:`tpu`).
        q_ref, k_ref, v_ref, do_ref: [bq, H], [T, H], [T, Hv], [bq, Hv].
        lse_ref, delta_ref: fp32 [1, bq], +inf where a query has no key.
        q_ids, k_ids: int32 [1, bq], [1, T], or None.
        dq_in: fp32 [bq, H], what other keys gave; or None.
        dk_in, dv_in: other keys', which stay as they are; or None.
        dq_sum, dk_sum, dv_sum: fp32 [H, bq], [T, H], [T, Hv].
        scores, d_weights, derivatives: fp32, of each of a few tiles [1, keys, queries]:
            S, dP and dS/d(q·k), the last only with a cap.
        weights, d_scores: likewise as q.
    """
    # The grid: kv heads of all rows, query heads of one, blocks of queries.
    member = pl.program_id(1)
    i = pl.program_id(2)
    scalars = statics.read_program_scalars(ints, floats)
    params = statics.params

    # dK and dV are summed over all queries that share the kv head.
    @pl.when((member == 0) & (i == 0))
    def clear_key_sums():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def start():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    def get_keys(tile, j):
        begin = j * walk.bk + tile.k0
        return pl.ds(pl.multiple_of(begin, LANES), tile.k1 - tile.k0)

    # Both are 0, and the compiler does not know (`ProgramScalars`).
    store_at = scalars.store_zero
    load_at = scalars.load_zero
    slots = len(scores)

    # The three stages of tile n, which leave what they find in its slot.

    def score(n, tile, j, distance):
        """S and dP = V·dOᵀ, [keys, queries]."""
        queries = slice(tile.q0, tile.q1)
        slot = n % slots
        products = multiply(k_ref[get_keys(tile, j)], q_ref[queries], 1, 1)
        score, derivative = scale_scores_to_log2(products, params)
        q_segments = None
        k_segments = None
        if tile.compares_segments:
            assert q_ids is not None
            assert k_ids is not None
            tile_ids = transpose_ids_to_lanes(k_ids[:, get_keys(tile, j)])
            q_segments = q_ids[:, queries]
            k_segments = jnp.tile(tile_ids, (1, score.shape[1] // LANES))
        position = TilePosition(
            distance + tile.q0 - tile.k0,
            j * walk.bk + tile.k0,
            q_segments,
            k_segments,
        )
        scores[slot][store_at] = apply_slope_and_mask(
            score, tile.masked, position, statics, scalars
        )
        d_weights[slot][store_at] = multiply(
            v_ref[get_keys(tile, j)], do_ref[queries], 1, 1
        )
        if derivatives is not None:
            derivatives[slot][store_at] = derivative
        yield

    def weigh(n, tile):
        """P = exp2(S − lse), and dS = P · (dP − delta)."""
        queries = slice(tile.q0, tile.q1)
        slot = n % slots
        lse = lse_ref[:, queries] * LOG2_E
        delta = delta_ref[:, queries]
        lse = jnp.broadcast_to(lse, (SUBLANES, lse.shape[1]))
        started: list[jax.Array] = []
        for begin in range(0, tile.k1 - tile.k0, CHUNK):
            chunk = slice(begin, begin + CHUNK)
            score = scores[slot][load_at, chunk]
            score_registers = reshape_by_register(score)
            paced_lse = limit_in_flight(lse, started, blocks.pace)
            exponent = score_registers - paced_lse
            weight = jnp.exp2(exponent).reshape(score.shape)
            started.append(weight[:SUBLANES])
            weights[slot][store_at, chunk] = weight.astype(do_ref.dtype)
            d_weight = d_weights[slot][load_at, chunk]
            d_score = weight * (d_weight - delta)
            if derivatives is not None:
                d_score = d_score * derivatives[slot][load_at, chunk]
            if tile.masked or tile.compares_segments:
                # Products with a masked key or value may have overflown.
                d_score = jnp.where(weight > 0, d_score, 0.0)
            d_scores[slot][store_at, chunk] = d_score.astype(q_ref.dtype)
        yield

    def add_gradients(n, tile, j):
        """dV += P·dO, dK += dS·Q and dQᵀ += Kᵀ·dS."""
        queries = slice(tile.q0, tile.q1)
        slot = n % slots
        weight = weights[slot][load_at]
        d_score = d_scores[slot][load_at]
        dv_sum[get_keys(tile, j)] += multiply(weight, do_ref[queries], 1, 0)
        dk_sum[get_keys(tile, j)] += multiply(d_score, q_ref[queries], 1, 0)
        dq_sum[:, queries] += multiply(k_ref[get_keys(tile, j)], d_score, 0, 0)
        yield

    def run_tiles(tiles, j, distance, is_first, is_last):
        interleave_stages(
            len(tiles),
            [
                (blocks.ahead, lambda n: score(n, tiles[n], j, distance)),
                (0, lambda n: weigh(n, tiles[n])),
                (-blocks.behind, lambda n: add_gradients(n, tiles[n], j)),
            ],
        )

    def finish():
        # Products were scaled before the softmax: so are gradients by them.
        if dq_in is None:
            dq = dq_sum[...] * params.scale
            dq_ref[...] = dq.astype(dq_ref.dtype).T
        else:
            dq = dq_sum[...].T * params.scale + dq_in[...]
            dq_ref[...] = dq.astype(dq_ref.dtype)

    table_row = scalars.row if statics.num_tables > 1 else 0
    row = [table[table_row, i, column] for column in range(COLUMNS)]
    visit_key_blocks(walk, row, i, scalars.qk_offset, start, run_tiles, finish)

    @pl.when((member == statics.group - 1) & (i == pl.num_programs(2) - 1))
    def write_key_gradients():
        dk_ref[...] = (dk_sum[...] * params.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
