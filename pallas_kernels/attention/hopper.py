"""Attention for Hopper (sm_90): Pallas Mosaic-GPU kernels with warp specialisation.

After Shah et al. 2024 (FlashAttention-3): of a program's three warpgroups one only copies blocks of
K and V to shared memory (TMA), two each hold 64 queries and multiply (wgmma). These two take turns:
while one has the tensor cores, the other takes its softmax. What is not supported here, a card of
another kind included, is for ``triton``. The backward pass is in ``hopper_backward``.

ptxas of CUDA 12.8.0 to 12.9.0 miscompiles kernels of this kind with a causal mask, as JAX's own
(``jax.experimental.pallas.ops.gpu.attention_mgpu``) says in refusing it: have 12.9.1 or later.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks, hopper_backward, triton
from pallas_kernels.attention import hopper_tile as parts
from pallas_kernels.attention.hopper_tile import ROWS, WARPGROUPS, HopperScoreTile, HopperStatics
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    BackwardArrays,
    merge_offsets,
)
from pallas_kernels.attention.triton_program import LN2, LOG2E

_BACKWARD_HEADS = 128


class HopperForwardBlocks(NamedTuple):
    """Blocks of the forward pass."""

    k: int
    """Keys of a block, a multiple of 64."""
    stages: int
    """Blocks of keys, and of values, in shared memory."""


class HopperBlockSizes(NamedTuple):
    forward: HopperForwardBlocks
    backward: hopper_backward.HopperBackwardBlocks | triton.TritonBlockSizes
    """Triton's with the heads whose backward pass is Triton's."""


def _checked(sizes: HopperBlockSizes) -> HopperBlockSizes:
    """Refuses blocks that warpgroups cannot multiply."""
    for blocks in sizes:
        if not isinstance(blocks, triton.TritonBlockSizes):
            *rows, stages = blocks
            if any(n < 1 or n % ROWS for n in rows) or stages < 1:
                raise ValueError(f"block_sizes: {blocks}: multiples of {ROWS}, a stage or more")
    return sizes


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, operands: AttentionOperands, params: AttentionParams
) -> bool:
    """bf16 or fp16, heads of 64, 128 or 256, lengths that 8 divides, positions in order."""
    return (
        q.shape[-1] in (64, 128, 256)
        and v.shape[-1] == q.shape[-1]
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype == v.dtype
        and operands.q_positions is None
        and operands.k_positions is None
        and operands.biases is None
        and params.scale > 0
        and q.size > 0 < k.size
        # Rows lie in shared memory by eights.
        and q.shape[1] % 8 == k.shape[1] % 8 == 0
    )


def default_block_sizes(H: int, dtype: Any) -> HopperBlockSizes:
    """Returns block sizes that fit in 227 KB of shared memory."""
    if H <= _BACKWARD_HEADS:
        return HopperBlockSizes(HopperForwardBlocks(128, 2), hopper_backward.default_block_sizes(H))
    return HopperBlockSizes(HopperForwardBlocks(64, 2), triton.default_block_sizes(H, H, dtype))


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass as :mod:`api` calls it."""
    params, interpret = call.params, parts.resolve_interpreter(call.interpret)
    sizes = _checked(call.block_sizes or default_block_sizes(q.shape[-1], q.dtype)).forward
    operands = merge_offsets(operands, params)
    (B, S, N, H), T = q.shape, k.shape[1]
    block_q = ROWS * WARPGROUPS
    tiles = pl.cdiv(S, block_q)
    inputs = {"q": q, "k": k, "v": v, **parts.list_mask_inputs(operands, params, block_q, sizes.k)}
    if gpu_blocks.needs_mask(params, operands, T, sizes.k):
        inputs["visits"] = gpu_blocks.plan_query_visits(S, T, block_q, sizes.k, operands, params)
    if operands.sinks is not None:
        inputs["sinks"] = operands.sinks
    s = HopperStatics(
        params, S, T, N // k.shape[2], sizes.k, sizes.stages, tuple(inputs), bool(interpret)
    )
    blocks = plgpu.SMEM((s.stages, s.block, H), q.dtype, transforms=parts.SWIZZLED)
    scratch = {
        "q": plgpu.SMEM((WARPGROUPS, ROWS, H), q.dtype, transforms=parts.SWIZZLED),
        "k": blocks,
        "v": blocks,
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=1 + s.has_segments),
        **parts.make_barriers(s, k=1 + s.has_segments, v=1),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        **parts.make_staging_buffer("o", call.dtype, q.dtype),
        **parts.make_segment_buffers(s, "q", "k"),
    }
    shapes = (
        jax.ShapeDtypeStruct(q.shape, call.dtype),
        jax.ShapeDtypeStruct((B, N, tiles * block_q), jnp.float32),
    )
    o, lse = parts.run_kernel(_forward_kernel, s, inputs, shapes, scratch, (N, tiles, B), interpret)
    return o, lse[..., :S].transpose(0, 2, 1)


def backward(
    arrays: BackwardArrays, operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the backward pass as :mod:`api` calls it; by Triton's kernels where sums of dK and dV do
    not fit in registers."""
    H, dtype = arrays.q.shape[-1], arrays.q.dtype
    sizes = _checked(call.block_sizes or default_block_sizes(H, dtype))
    call = call._replace(block_sizes=sizes.backward)
    if H > _BACKWARD_HEADS:
        return triton.backward(arrays, operands, call._replace(interpret=bool(call.interpret)))
    operands = merge_offsets(operands, call.params)
    call = call._replace(interpret=parts.resolve_interpreter(call.interpret))
    lse = jnp.where(arrays.lse == -jnp.inf, jnp.inf, arrays.lse * LOG2E).transpose(0, 2, 1)
    delta, d_o = arrays.delta.transpose(0, 2, 1), arrays.d_o.astype(dtype)
    arrays = arrays._replace(lse=lse, delta=delta, d_o=d_o)
    d_q = hopper_backward.compute_d_q(arrays, operands, call)
    return d_q, *hopper_backward.compute_d_kv(arrays, operands, call)


def _forward_kernel(s: HopperStatics, refs, outputs, shared) -> None:
    copy = partial(parts.copy_key_value_blocks, s, refs, shared)
    multiply = partial(_attend, s, refs, outputs, shared)
    parts.run_warpgroups(s, refs, copy, multiply, last_first=s.params.causal)


def _attend(s: HopperStatics, refs, outputs, shared, visits, row, head, start, me) -> None:
    """A warpgroup that multiplies: queries ``start`` and the 63 after it."""
    block_k = s.block
    q, H = shared["q"].at[me], shared["q"].shape[-1]
    mine = pl.ds(start, ROWS)
    sources = {"q": refs["q"].at[row, mine, head]}
    if s.has_segments:
        sources["q_segments"] = refs["q_segments"].at[row, mine]
    parts.copy_own_tiles(shared, "q_ready", me, sources)
    if s.has_segments:
        own_segments = parts.load_shared(shared["q_segments"].at[me], parts.ALONG_ROWS)
        own_segments = parts.broadcast_rows(own_segments, block_k)

    def take_turn():
        """The other warpgroup goes on where it waits, and this one when the other comes here."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step(at, carry, masked):
        o, top, total = carry
        slot = lax.rem(at, jnp.int32(s.stages))
        plgpu.barrier_wait(shared["k_ready"].at[slot])

        products = parts.multiply_transposed(q, shared["k"].at[slot], take_turn)
        segments = ()
        if masked and s.has_segments:
            other = parts.load_shared(shared["k_segments"].at[slot], parts.ALONG_COLUMNS)
            segments = own_segments, parts.broadcast_columns(other, ROWS)
        parts.release_slot(s, shared["k_free"].at[slot])
        starts = start, block_of(at) * block_k
        tile = HopperScoreTile(s, refs, (ROWS, block_k), 0, starts, (row, head))
        scores, _ = tile.scores(products)
        if masked:
            scores = jnp.where(tile.compute_mask(*segments), scores, -jnp.inf)

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
        top, total = refs["sinks"][head] * LOG2E, 1.0
    else:
        top, total = -jnp.inf, 0.0
    top, total = (
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), parts.ALONG_ROWS) for x in (top, total)
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
    parts.store_tile(shared.get("o", shared["q"]).at[me], outputs[0].at[row, mine, head], o)
