"""Attention for Hopper (sm_90): Pallas Mosaic-GPU kernels with warp specialisation.

After Shah et al. 2024 (FlashAttention-3): of a program's three warpgroups one only
copies blocks of K and V to shared memory (TMA), two each hold 64 queries and multiply
(wgmma). These two take turns: while one has the tensor cores, the other takes its
softmax. What is not supported here, a card of another kind included, is for ``triton``.

ptxas of CUDA 12.8.0 to 12.9.0 miscompiles kernels of this kind with a causal mask, as
JAX's own (``jax.experimental.pallas.ops.gpu.attention_mgpu``) says in refusing it: have
12.9.1 or later.
"""

from typing import NamedTuple

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
    HopperScoreTile,
    HopperStatics,
)
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    OutputArrays,
    merge_offsets,
)

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
    default = HopperBlockSizes(
        128 if H <= _BACKWARD_HEADS else 64, 64 if H > 64 else 128, 64, 2
    )
    sizes = call.block_sizes or default
    if any(n < 1 or n % ROWS for n in sizes[:3]) or sizes.stages < 1:
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
    rows = pl.cdiv(S, ROWS * WARPGROUPS) * ROWS * WARPGROUPS
    o, lse = parts.run_kernel(
        *(parts.copy_key_value_blocks, _attend, inputs, operands, call),
        (
            jax.ShapeDtypeStruct(q.shape, call.dtype),
            jax.ShapeDtypeStruct((B, N, rows), jnp.float32),
        ),
        per_query=True,
        block=sizes.forward_keys,
        stages=sizes.stages,
        own=("q", "q_segments"),
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
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E).transpose(0, 2, 1)
    delta = delta.transpose(0, 2, 1)
    d_o = d_o.astype(dtype)
    inputs = {"q": operands.q, "k": operands.k, "v": operands.v}
    inputs |= {"lse": lse, "delta": delta, "d_o": d_o}
    q, k, v = (jax.ShapeDtypeStruct(x.shape, call.dtype) for x in operands[:3])
    (d_q,) = parts.run_kernel(
        *(parts.copy_key_value_blocks, _sum_d_q, inputs, operands, call, (q,)),
        per_query=True,
        block=sizes.d_q_keys,
        stages=sizes.stages,
        own=("q", "d_o", "lse", "delta", "q_segments"),
        visited=(("k", "k_segments"), ("v",)),
    )
    d_k, d_v = parts.run_kernel(
        *(_copy_queries, _sum_d_kv, inputs, operands, call, (k, v)),
        per_query=False,
        block=sizes.d_kv_queries,
        stages=sizes.stages,
        own=("k", "v", "k_segments"),
        visited=(("q", "lse", "q_segments"), ("d_o", "delta")),
    )
    return d_q, d_k, d_v


def _attend(
    s: HopperStatics, refs, outputs, shared, visits, row, head, start, me
) -> None:
    """A warpgroup that multiplies: queries ``start`` and the 63 after it."""
    block_k = s.block
    q, H = shared["q"].at[me], shared["q"].shape[-1]
    mine = pl.ds(start, ROWS)
    parts.copy_own_tiles(s, refs, shared, me, row, head, mine)
    if s.has_segments:
        own_segments = parts.load_shared(shared["q_segments"].at[me], parts.ALONG_ROWS)
        own_segments = parts.broadcast_rows(own_segments, block_k)

    def take_turn():
        """The other warpgroup goes on where it waits, and this one when the other comes
        here."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step(at, carry, masked):
        o, top, total = carry
        slot = lax.rem(at, jnp.int32(s.stages))
        plgpu.barrier_wait(shared["k_ready"].at[slot])

        products = parts.multiply_transposed(q, shared["k"].at[slot], take_turn)
        segments = None
        if masked and s.has_segments:
            other = parts.load_shared(
                shared["k_segments"].at[slot], parts.ALONG_COLUMNS
            )
            segments = own_segments, parts.broadcast_columns(other, ROWS)
        parts.release_slot(s, shared["k_free"].at[slot])
        starts = start, block_of(at) * block_k
        tile = HopperScoreTile(s, refs, (ROWS, block_k), 0, starts, (row, head))
        scores, _ = tile.scores(products)
        if masked:
            scores = jnp.where(tile.compute_mask(segments), scores, -jnp.inf)

        new_top = jnp.maximum(top, scores.max(axis=1) * s.exp2_scale)
        # Rows that have seen no key: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = jnp.exp2(scores * s.exp2_scale - parts.broadcast_rows(base, block_k))
        decay = jnp.exp2(top - base)
        total = total * decay + weights.sum(axis=1)
        o = o * parts.broadcast_rows(decay, H)
        weights = weights.astype(shared["v"].dtype)
        take_turn()
        plgpu.barrier_wait(shared["v_ready"].at[slot])

        o = parts.add_product(s, o, weights, shared["v"].at[slot])
        parts.release_slot(s, shared["v_free"].at[slot])
        return o, new_top, total

    masked, count, block_of = parts.order_visits(visits, pl.cdiv(s.T, block_k))
    if "sinks" in refs:
        top = refs["sinks"][head] * LOG2E
        total = 1.0
    else:
        top = -jnp.inf
        total = 0.0
    top, total = (
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), parts.ALONG_ROWS)
        for x in (top, total)
    )
    pl.when(me == 1)(take_turn)
    carry = parts.make_zeros(ROWS, H), top, total
    o, top, total = parts.visit_visible_blocks(visits, masked, count, step, carry)
    pl.when(me == 0)(take_turn)

    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top * LN2 + jnp.log(safe), -jnp.inf)
    shared["lse"].at[me][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared["lse"].at[me], outputs[1].at[row, head, mine])
    o = o * parts.broadcast_rows(1 / safe, H)
    parts.store_tile(
        shared.get("staged", shared["q"]).at[me], outputs[0].at[row, mine, head], o
    )


def _sum_d_q(
    s: HopperStatics, refs, outputs, shared, visits, row, head, start, me
) -> None:
    """64 queries from ``start``."""
    mine = pl.ds(start, ROWS)
    H = shared["q"].shape[-1]
    block_k = s.block
    parts.copy_own_tiles(s, refs, shared, me, row, head, mine)

    def own(name):
        x = parts.load_shared(shared[name].at[me], parts.ALONG_ROWS)
        return parts.broadcast_rows(x, block_k)

    def step(at, d_q, masked):
        slot = lax.rem(at, jnp.int32(s.stages))
        for name in ("k", "v"):
            plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
        k = shared["k"].at[slot]
        products = parts.multiply_transposed(shared["q"].at[me], k, lambda: None)
        segments = None
        if masked and s.has_segments:
            other = parts.load_shared(
                shared["k_segments"].at[slot], parts.ALONG_COLUMNS
            )
            segments = own("q_segments"), parts.broadcast_columns(other, ROWS)
        d_o, v = shared["d_o"].at[me], shared["v"].at[slot]
        d_weights = parts.multiply_transposed(d_o, v, lambda: None)
        parts.release_slot(s, shared["v_free"].at[slot])
        starts = start, block_of(at) * block_k
        tile = HopperScoreTile(s, refs, (ROWS, block_k), 0, starts, (row, head))
        scores, slope = tile.scores(products)
        seen = tile.compute_mask(segments) if masked else None
        _, d_scores = compute_weights_and_d_scores(
            scores, slope, own("lse"), d_weights, own("delta"), seen, s.exp2_scale
        )
        d_q = parts.add_product(s, d_q, d_scores.astype(k.dtype), k)
        parts.release_slot(s, shared["k_free"].at[slot])
        return d_q

    masked, count, block_of = parts.order_visits(visits, pl.cdiv(s.T, block_k))
    d_q = parts.visit_visible_blocks(
        visits, masked, count, step, parts.make_zeros(ROWS, H)
    )
    staged = shared.get("staged", shared["q"]).at[me]
    parts.store_tile(staged, outputs[0].at[row, mine, head], d_q * s.params.scale)


def _each(s: HopperStatics, visits, body, carry):
    """``body(at, member, block, masked, carry)`` over what a block of keys visits: each
    query head of the group makes all visits with a mask, then each all others. ``at``
    counts."""
    masked, total, block_of = parts.order_visits(visits, pl.cdiv(s.S, s.block))

    def loop(begin, count, is_masked, carry):
        def step(t, carry):
            member = 0 if s.group == 1 else lax.div(t, count)
            block = block_of(begin + t - member * count)
            return body(begin * s.group + t, member, block, is_masked, carry)

        return lax.fori_loop(0, count * s.group, step, carry)

    if visits is not None:
        carry = loop(0, masked, True, carry)
    return loop(masked, total - masked, False, carry)


def _copy_queries(s: HopperStatics, refs, shared, visits, row, kv_head) -> None:
    def copy(at, member, block, _, carry):
        parts.copy_block(s, refs, shared, at, row, kv_head * s.group + member, block)
        return carry

    _each(s, visits, copy, None)


def _sum_d_kv(
    s: HopperStatics, refs, outputs, shared, visits, row, kv_head, start, me
) -> None:
    """64 keys from ``start``. Tiles are transposed, [keys, queries]."""
    mine = pl.ds(start, ROWS)
    H = shared["k"].shape[-1]
    block_q = s.block
    parts.copy_own_tiles(s, refs, shared, me, row, kv_head, mine)

    def step(at, member, block, masked, carry):
        d_k, d_v = carry
        slot = lax.rem(at, jnp.int32(s.stages))

        def beside(name):
            x = parts.load_shared(shared[name].at[slot], parts.ALONG_COLUMNS)
            return parts.broadcast_columns(x, ROWS)

        for name in ("q", "d_o"):
            plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
        q, d_o = shared["q"].at[slot], shared["d_o"].at[slot]
        products = parts.multiply_transposed(shared["k"].at[me], q, lambda: None)
        d_weights = parts.multiply_transposed(shared["v"].at[me], d_o, lambda: None)
        at_head = row, kv_head * s.group + member
        tile = HopperScoreTile(
            s, refs, (ROWS, block_q), 1, (block * block_q, start), at_head
        )
        scores, slope = tile.scores(products)
        segments = None
        if masked and s.has_segments:
            own = parts.load_shared(shared["k_segments"].at[me], parts.ALONG_ROWS)
            segments = beside("q_segments"), parts.broadcast_rows(own, block_q)
        seen = tile.compute_mask(segments) if masked else None
        weights, d_scores = compute_weights_and_d_scores(
            scores, slope, beside("lse"), d_weights, beside("delta"), seen, s.exp2_scale
        )
        d_v = parts.add_product(s, d_v, weights.astype(d_o.dtype), d_o)
        parts.release_slot(s, shared["d_o_free"].at[slot])
        d_k = parts.add_product(s, d_k, d_scores.astype(q.dtype), q)
        parts.release_slot(s, shared["q_free"].at[slot])
        return d_k, d_v

    d_k, d_v = _each(
        s, visits, step, (parts.make_zeros(ROWS, H), parts.make_zeros(ROWS, H))
    )
    target = (row, mine, kv_head)
    for name, ref, x in (
        ("k", outputs[0], d_k * s.params.scale),
        ("v", outputs[1], d_v),
    ):
        parts.store_tile(shared.get("staged", shared[name]).at[me], ref.at[target], x)
