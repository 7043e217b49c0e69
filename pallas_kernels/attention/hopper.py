"""Attention for Hopper (sm_90): Pallas Mosaic-GPU kernels with warp specialisation.

After Shah et al. 2024 (FlashAttention-3): of a program's three warpgroups one only
copies blocks of K and V to shared memory (TMA), two each hold 64 queries and multiply
(wgmma). These two take turns: while one has the tensor cores, the other takes its
softmax. What is not supported here, a card of another kind included, is for ``triton``.

ptxas of CUDA 12.8.0 to 12.9.0 miscompiles kernels of this kind with a causal mask, as
JAX's own (``jax.experimental.pallas.ops.gpu.attention_mgpu``) says in refusing it: have
12.9.1 or later.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import hopper_tile as parts
from pallas_kernels.attention import triton
from pallas_kernels.attention.gpu_blocks import LN2, LOG2E, compute_weights_and_d_scores
from pallas_kernels.attention.hopper_tile import (
    ROWS,
    WARPGROUPS,
    HopperProgram,
    HopperScoreTile,
)
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    OutputArrays,
    merge_offsets,
)
from pallas_kernels.kernel_types import Carry, Index

# Features of a head up to which sums of dK and dV fit in registers.
_BACKWARD_HEADS = 128


class HopperBlockSizes(NamedTuple):
    """Rows of a block, multiples of 64."""

    forward_keys: int
    d_q_keys: int
    """Keys of a block that dQ visits."""
    d_kv_queries: int
    """Queries of a block that dK and dV visit."""
    stages: int
    """Blocks of each operand in shared memory."""


def supports(operands: AttentionOperands, params: AttentionParams) -> bool:
    """bf16 or fp16, heads of 64, 128 or 256, lengths that 8 divides, positions in
    order."""
    q, k, v, *_ = operands
    return (
        q.shape[-1] in (64, 128, 256)
        and v.shape[-1] == q.shape[-1]
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype == v.dtype
        and operands.q_positions is None
        and operands.biases is None
        and params.scale > 0
        and q.size > 0 < k.size
        # Rows lie in shared memory by eights.
        and q.shape[1] % 8 == k.shape[1] % 8 == 0
    )


def _choose_blocks(H: int, call: AttentionCall) -> HopperBlockSizes:
    """Returns the blocks given, checked, or those that fit in 227 KB of shared memory,
    and in registers."""
    override = cast(HopperBlockSizes | None, call.block_sizes)
    sizes = override or HopperBlockSizes(
        forward_keys=128 if H <= _BACKWARD_HEADS else 64,
        d_q_keys=64 if H > 64 else 128,
        d_kv_queries=64,
        stages=2,
    )
    rows = (sizes.forward_keys, sizes.d_q_keys, sizes.d_kv_queries)
    if any(n < 1 or n % ROWS for n in rows) or sizes.stages < 1:
        raise ValueError(f"block_sizes: {sizes}: multiples of {ROWS}, a stage or more")
    return sizes


def forward(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass as :mod:`api` calls it."""
    operands = merge_offsets(operands, call.params)
    q, k, v, *_ = operands
    sizes = _choose_blocks(q.shape[-1], call)
    B, S, N, _ = q.shape
    inputs = {"q": q, "k": k, "v": v}
    if operands.sinks is not None:
        inputs["sinks"] = operands.sinks
    padded_S = pl.cdiv(S, ROWS * WARPGROUPS) * ROWS * WARPGROUPS
    o, lse = parts.run_kernel(
        parts.copy_key_value_blocks,
        _attend,
        inputs,
        operands,
        call,
        (
            jax.ShapeDtypeStruct(q.shape, call.dtype),
            jax.ShapeDtypeStruct((B, N, padded_S), jnp.float32),
        ),
        per_query=True,
        block=sizes.forward_keys,
        stages=sizes.stages,
        resident=("q", "q_segments"),
        visited=(("k", "k_segments"), ("v",)),
        scratch={
            "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
    )
    return o, lse[..., :S].transpose(0, 2, 1)


def backward(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the backward pass as :mod:`api` calls it: dQ by blocks of keys, dK and dV by
    blocks of queries, so that no sum is atomic and results repeat bit for bit; by
    Triton's kernels where sums of dK and dV do not fit in registers."""
    H = operands.q.shape[-1]
    dtype = operands.q.dtype
    if H > _BACKWARD_HEADS:
        call = call._replace(block_sizes=None, interpret=bool(call.interpret))
        return triton.backward(operands, saved, call)
    sizes = _choose_blocks(H, call)
    operands = merge_offsets(operands, call.params)
    lse, delta, d_o = saved
    # +inf where no key is left: its weights are then exp2(score − inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E).transpose(0, 2, 1)
    delta = delta.transpose(0, 2, 1)
    inputs = {
        "q": operands.q,
        "k": operands.k,
        "v": operands.v,
        "lse": lse,
        "delta": delta,
        "d_o": d_o.astype(dtype),
    }
    q, k, v = (jax.ShapeDtypeStruct(x.shape, call.dtype) for x in operands[:3])
    (d_q,) = parts.run_kernel(
        parts.copy_key_value_blocks,
        _sum_d_q,
        inputs,
        operands,
        call,
        (q,),
        per_query=True,
        block=sizes.d_q_keys,
        stages=sizes.stages,
        resident=("q", "d_o", "lse", "delta", "q_segments"),
        visited=(("k", "k_segments"), ("v",)),
    )
    d_k, d_v = parts.run_kernel(
        _copy_queries,
        _sum_d_kv,
        inputs,
        operands,
        call,
        (k, v),
        per_query=False,
        block=sizes.d_kv_queries,
        stages=sizes.stages,
        resident=("k", "v", "k_segments"),
        visited=(("q", "lse", "q_segments"), ("d_o", "delta")),
    )
    return d_q, d_k, d_v


def _attend(program: HopperProgram) -> None:
    """A warpgroup that multiplies: 64 queries, an online softmax over blocks of
    keys."""
    p = program
    s = p.statics
    shared = p.shared
    block_k = s.block
    q = shared["q"].at[p.warpgroup]
    H = shared["q"].shape[-1]
    rows = p.rows

    # What stays: the queries in shared memory, their segments in registers.
    parts.copy_resident_tiles(p)
    q_segments = None
    if s.has_segments:
        segments_ref = shared["q_segments"].at[p.warpgroup]
        q_segments = parts.load_shared(segments_ref, parts.ALONG_ROWS)
        q_segments = parts.broadcast_rows(q_segments, block_k)

    def take_turn():
        """The other warpgroup goes on where it waits, and this one when the other comes
        here."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step(visit, carry, masked):
        """Adds a block of keys to the online softmax: the sum of weighted values, the
        largest score and the sum of weights so far, in units of log2."""
        o, top, total = carry
        slot = lax.rem(visit, jnp.int32(s.stages))
        plgpu.barrier_wait(shared["k_ready"].at[slot])

        # Scores [ROWS, block_k], −inf where a query does not see a key.
        products = parts.multiply_transposed(q, shared["k"].at[slot], take_turn)
        segments = None
        if masked and q_segments is not None:
            segments_ref = shared["k_segments"].at[slot]
            k_segments = parts.load_shared(segments_ref, parts.ALONG_COLUMNS)
            segments = q_segments, parts.broadcast_columns(k_segments, ROWS)
        parts.release_slot(s, shared["k_free"].at[slot])
        tile = HopperScoreTile(
            p,
            (ROWS, block_k),
            q_axis=0,
            q_start=p.start,
            k_start=block_of(visit) * block_k,
            head=p.head,
        )
        scores, _ = tile.scores(products)
        if masked:
            scores = jnp.where(tile.compute_mask(segments), scores, -jnp.inf)

        # Weights by the largest score so far; earlier sums were by an earlier one, and
        # decay.
        block_top = scores.max(axis=1) * s.exp2_scale
        new_top = jnp.maximum(top, block_top)
        # Rows that have seen no key: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        exponents = scores * s.exp2_scale - parts.broadcast_rows(base, block_k)
        weights = jnp.exp2(exponents)
        decay = jnp.exp2(top - base)
        total = total * decay + weights.sum(axis=1)
        o = o * parts.broadcast_rows(decay, H)
        weights = weights.astype(shared["v"].dtype)
        take_turn()
        plgpu.barrier_wait(shared["v_ready"].at[slot])

        o = parts.add_product(s, o, weights, shared["v"].at[slot])
        parts.release_slot(s, shared["v_free"].at[slot])
        return o, new_top, total

    masked, count, block_of = parts.order_visits(p.visits, pl.cdiv(s.T, block_k))
    if "sinks" in p.inputs:
        # As if a key with the sink's score had come first, and a value of zeros.
        first_top = p.inputs["sinks"][p.head] * LOG2E
        first_total = 1.0
    else:
        first_top = -jnp.inf
        first_total = 0.0
    top = plgpu.layout_cast(jnp.full((ROWS,), first_top, jnp.float32), parts.ALONG_ROWS)
    total = plgpu.layout_cast(
        jnp.full((ROWS,), first_total, jnp.float32), parts.ALONG_ROWS
    )
    # Warpgroup 1 waits until warpgroup 0 has its first products under way; at the end
    # 0 lets 1 go on.
    pl.when(p.warpgroup == 1)(take_turn)
    carry = parts.make_zeros(ROWS, H), top, total
    o, top, total = parts.visit_visible_blocks(p.visits, masked, count, step, carry)
    pl.when(p.warpgroup == 0)(take_turn)

    # Results: zeros and −inf where a query has seen neither a key nor a sink. They go to
    # global memory by way of shared memory, o in the queries' place where types allow.
    safe_total = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top * LN2 + jnp.log(safe_total), -jnp.inf)
    o_ref, lse_ref = p.outputs
    staged_lse = shared["lse"].at[p.warpgroup]
    staged_lse[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged_lse, lse_ref.at[p.row, p.head, rows])
    o = o * parts.broadcast_rows(1 / safe_total, H)
    staged_o = shared.get("staged", shared["q"]).at[p.warpgroup]
    parts.store_tile(staged_o, o_ref.at[p.row, rows, p.head], o)


def _sum_d_q(program: HopperProgram) -> None:
    """A warpgroup that multiplies: dQ of 64 queries, over blocks of keys."""
    p = program
    s = p.statics
    shared = p.shared
    rows = p.rows
    H = shared["q"].shape[-1]
    block_k = s.block
    parts.copy_resident_tiles(p)

    def load_resident(name):
        x = parts.load_shared(shared[name].at[p.warpgroup], parts.ALONG_ROWS)
        return parts.broadcast_rows(x, block_k)

    def step(visit, d_q, masked):
        """Adds a block of keys to dQ, by dS·K."""
        slot = lax.rem(visit, jnp.int32(s.stages))
        for name in ("k", "v"):
            plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
        k = shared["k"].at[slot]
        q = shared["q"].at[p.warpgroup]
        products = parts.multiply_transposed(q, k, lambda: None)
        segments = None
        if masked and s.has_segments:
            segments_ref = shared["k_segments"].at[slot]
            k_segments = parts.load_shared(segments_ref, parts.ALONG_COLUMNS)
            q_segments = load_resident("q_segments")
            segments = q_segments, parts.broadcast_columns(k_segments, ROWS)
        # dP = dO·Vᵀ, the last that is read of the values.
        d_o = shared["d_o"].at[p.warpgroup]
        v = shared["v"].at[slot]
        d_weights = parts.multiply_transposed(d_o, v, lambda: None)
        parts.release_slot(s, shared["v_free"].at[slot])
        tile = HopperScoreTile(
            p,
            (ROWS, block_k),
            q_axis=0,
            q_start=p.start,
            k_start=block_of(visit) * block_k,
            head=p.head,
        )
        scores, derivative = tile.scores(products)
        mask = tile.compute_mask(segments) if masked else None
        lse = load_resident("lse")
        delta = load_resident("delta")
        _, d_scores = compute_weights_and_d_scores(
            scores, derivative, lse, d_weights, delta, mask, s.exp2_scale
        )
        d_q = parts.add_product(s, d_q, d_scores.astype(k.dtype), k)
        parts.release_slot(s, shared["k_free"].at[slot])
        return d_q

    masked, count, block_of = parts.order_visits(p.visits, pl.cdiv(s.T, block_k))
    zeros = parts.make_zeros(ROWS, H)
    d_q = parts.visit_visible_blocks(p.visits, masked, count, step, zeros)
    staged = shared.get("staged", shared["q"]).at[p.warpgroup]
    (d_q_ref,) = p.outputs
    parts.store_tile(staged, d_q_ref.at[p.row, rows, p.head], d_q * s.params.scale)


def _visit_queries(
    program: HopperProgram,
    body: Callable[[jax.Array, Index, jax.Array, bool, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Runs ``body(visit, member, block, masked, carry)`` over what a block of keys
    visits: each query head of the group, ``member``, makes all visits with a mask, then
    each all others. ``visit`` counts them all."""
    s = program.statics
    masked, total, block_of = parts.order_visits(program.visits, pl.cdiv(s.S, s.block))

    def loop(begin, count, is_masked, carry):
        def step(t, carry):
            member = 0 if s.group == 1 else lax.div(t, count)
            block = block_of(begin + t - member * count)
            return body(begin * s.group + t, member, block, is_masked, carry)

        return lax.fori_loop(0, count * s.group, step, carry)

    if program.visits is not None:
        carry = loop(0, masked, True, carry)
    return loop(masked, total - masked, False, carry)


def _copy_queries(program: HopperProgram) -> None:
    """The warpgroup that copies: blocks of queries."""
    first_head = program.head

    def copy(visit, member, block, _, carry):
        head = first_head * program.statics.group + member
        parts.copy_block(program, visit, head, block)
        return carry

    _visit_queries(program, copy, None)


def _sum_d_kv(program: HopperProgram) -> None:
    """A warpgroup that multiplies: dK and dV of 64 keys, over blocks of queries. Tiles
    are transposed, [keys, queries]."""
    p = program
    s = p.statics
    shared = p.shared
    kv_head = p.head
    rows = p.rows
    H = shared["k"].shape[-1]
    block_q = s.block
    parts.copy_resident_tiles(p)

    def step(visit, member, block, masked, carry):
        """Adds a block of queries of one head to dK, by dSᵀ·Q, and to dV, by Pᵀ·dO."""
        d_k, d_v = carry
        slot = lax.rem(visit, jnp.int32(s.stages))

        def load_visited(name):
            x = parts.load_shared(shared[name].at[slot], parts.ALONG_COLUMNS)
            return parts.broadcast_columns(x, ROWS)

        for name in ("q", "d_o"):
            plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
        q = shared["q"].at[slot]
        d_o = shared["d_o"].at[slot]
        k = shared["k"].at[p.warpgroup]
        products = parts.multiply_transposed(k, q, lambda: None)
        v = shared["v"].at[p.warpgroup]
        d_weights = parts.multiply_transposed(v, d_o, lambda: None)
        head = kv_head * s.group + member
        tile = HopperScoreTile(
            p,
            (ROWS, block_q),
            q_axis=1,
            q_start=block * block_q,
            k_start=p.start,
            head=head,
        )
        scores, derivative = tile.scores(products)
        segments = None
        if masked and s.has_segments:
            segments_ref = shared["k_segments"].at[p.warpgroup]
            k_segments = parts.load_shared(segments_ref, parts.ALONG_ROWS)
            q_segments = load_visited("q_segments")
            segments = q_segments, parts.broadcast_rows(k_segments, block_q)
        mask = tile.compute_mask(segments) if masked else None
        lse = load_visited("lse")
        delta = load_visited("delta")
        weights, d_scores = compute_weights_and_d_scores(
            scores, derivative, lse, d_weights, delta, mask, s.exp2_scale
        )
        d_v = parts.add_product(s, d_v, weights.astype(d_o.dtype), d_o)
        parts.release_slot(s, shared["d_o_free"].at[slot])
        d_k = parts.add_product(s, d_k, d_scores.astype(q.dtype), q)
        parts.release_slot(s, shared["q_free"].at[slot])
        return d_k, d_v

    zeros = parts.make_zeros(ROWS, H), parts.make_zeros(ROWS, H)
    d_k, d_v = _visit_queries(p, step, zeros)
    d_k_ref, d_v_ref = p.outputs
    # Where results are not in the operands' dtype, k and v share a buffer; else each
    # result takes the place of its operand, which nobody reads again.
    staged_k = shared.get("staged", shared["k"]).at[p.warpgroup]
    staged_v = shared.get("staged", shared["v"]).at[p.warpgroup]
    d_k = d_k * s.params.scale
    parts.store_tile(staged_k, d_k_ref.at[p.row, rows, kv_head], d_k)
    parts.store_tile(staged_v, d_v_ref.at[p.row, rows, kv_head], d_v)
