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

# Keys whose weights are computed at once.
CHUNK = 32


def backward_kernel(
    table, ints, floats, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, q_ids, k_ids, dq_in,
    dk_in, dv_in, dq_ref, dk_ref, dv_ref, dq, dk, dv, scores, d_ps, slopes, ps, d_ss,
    *, walk: KeyWalk, statics: KernelStatics, blocks: TpuBlocks,
):  # fmt: skip
    """Computes one block of queries of one head.

    Args:
        table, ints, floats: scalars (:mod:`tpu`).
        q_ref, k_ref, v_ref, do_ref: [bq, H], [T, H], [T, Hv], [bq, Hv].
        lse_ref, delta_ref: fp32 [1, bq], +inf where a query has no key.
        q_ids, k_ids: int32 [1, bq], [1, T], or None.
        dq_in: fp32 [bq, H], what other keys gave; or None.
        dk_in, dv_in: other keys', which stay as they are; or None.
        dq, dk, dv: fp32 [H, bq], [T, H], [T, Hv], sums.
        scores, d_ps, slopes: fp32, of each of a few tiles [1, keys, queries]: S, dP and
            dS/d(q·k), the last only with a cap.
        ps, d_ss: likewise as q.
    """
    g, i = pl.program_id(1), pl.program_id(2)
    scalars = statics.read_program_scalars(ints, floats)
    params = statics.params

    @pl.when((g == 0) & (i == 0))
    def _():
        dk[...] = jnp.zeros(dk.shape, jnp.float32)
        dv[...] = jnp.zeros(dv.shape, jnp.float32)

    def start():
        dq[...] = jnp.zeros(dq.shape, jnp.float32)

    def keys(tile, j):
        return pl.ds(pl.multiple_of(j * walk.bk + tile.k0, LANES), tile.k1 - tile.k0)

    put = scalars.store_zero
    get = scalars.load_zero
    slots = len(scores)

    def score(n, tile, j, distance):
        rows = slice(tile.q0, tile.q1)
        slot = n % slots
        s, slope = scale_scores_to_log2(
            multiply(k_ref[keys(tile, j)], q_ref[rows], 1, 1), params
        )
        segments = None, None
        if tile.compares_segments:
            own = transpose_ids_to_lanes(k_ids[:, keys(tile, j)])
            segments = q_ids[:, rows], jnp.tile(own, (1, s.shape[1] // LANES))
        spot = TilePosition(
            distance + tile.q0 - tile.k0, j * walk.bk + tile.k0, *segments
        )
        scores[slot][put] = apply_slope_and_mask(s, tile.masked, spot, statics, scalars)
        d_ps[slot][put] = multiply(v_ref[keys(tile, j)], do_ref[rows], 1, 1)
        if slope is not None:
            slopes[slot][put] = slope
        yield

    def softmax(n, tile):
        rows = slice(tile.q0, tile.q1)
        slot = n % slots
        lse = lse_ref[:, rows] * LOG2_E
        delta = delta_ref[:, rows]
        lse = jnp.broadcast_to(lse, (SUBLANES, lse.shape[1]))
        begun: list[jax.Array] = []
        for a in range(0, tile.k1 - tile.k0, CHUNK):
            at = slice(a, a + CHUNK)
            s = scores[slot][get, at]
            p = reshape_by_register(s) - limit_in_flight(lse, begun, blocks.pace)
            p = jnp.exp2(p).reshape(s.shape)
            begun.append(p[:SUBLANES])
            ps[slot][put, at] = p.astype(do_ref.dtype)
            d_s = p * (d_ps[slot][get, at] - delta)
            if slopes is not None:
                d_s = d_s * slopes[slot][get, at]
            if tile.masked or tile.compares_segments:
                # Products with a masked key or value may have overflown.
                d_s = jnp.where(p > 0, d_s, 0.0)
            d_ss[slot][put, at] = d_s.astype(q_ref.dtype)
        yield

    def gradients(n, tile, j):
        rows = slice(tile.q0, tile.q1)
        slot = n % slots
        p, d_s = ps[slot][get], d_ss[slot][get]
        dv[keys(tile, j)] += multiply(p, do_ref[rows], 1, 0)
        dk[keys(tile, j)] += multiply(d_s, q_ref[rows], 1, 0)
        dq[:, rows] += multiply(k_ref[keys(tile, j)], d_s, 0, 0)
        yield

    def tiles(these, j, distance, first, last):
        interleave_stages(
            len(these),
            [
                (blocks.ahead, lambda n: score(n, these[n], j, distance)),
                (0, lambda n: softmax(n, these[n])),
                (-blocks.behind, lambda n: gradients(n, these[n], j)),
            ],
        )

    row = [
        table[(scalars.row if statics.num_tables > 1 else 0), i, c]
        for c in range(COLUMNS)
    ]

    def finish():
        if dq_in is None:
            dq_ref[...] = (dq[...] * params.scale).astype(dq_ref.dtype).T
        else:
            dq_ref[...] = (dq[...].T * params.scale + dq_in[...]).astype(dq_ref.dtype)

    visit_key_blocks(walk, row, i, scalars.qk_offset, start, tiles, finish)

    @pl.when((g == statics.group - 1) & (i == pl.num_programs(2) - 1))
    def _():
        dk_ref[...] = (dk[...] * params.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)
