"""Gradients of attention for Hopper: dQ by blocks of keys, dK and dV by blocks of queries, so that
no sum is atomic and results repeat bit for bit."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention import hopper_tile as parts
from pallas_kernels.attention.hopper_tile import ROWS, WARPGROUPS, HopperScoreTile, HopperStatics
from pallas_kernels.attention.params import AttentionCall, AttentionOperands, BackwardArrays
from pallas_kernels.attention.triton_program import compute_weights_and_d_scores


class HopperBackwardBlocks(NamedTuple):
    k: int
    """Keys of a block that dQ visits, a multiple of 64."""
    q: int
    """Queries of a block that dK and dV visit, likewise."""
    stages: int
    """Blocks of each operand in shared memory."""


def default_block_sizes(H: int) -> HopperBackwardBlocks:
    """Returns blocks that fit in 227 KB of shared memory and in registers."""
    return HopperBackwardBlocks(64 if H > 64 else 128, 64, 2)


def compute_d_q(
    arrays: BackwardArrays, operands: AttentionOperands, call: AttentionCall
) -> jax.Array:
    """Computes dQ with lse and delta [B, N, S], lse in base 2 and +inf where a query has no key,
    and :class:`HopperBackwardBlocks` as block sizes."""
    (q, k, v, lse, delta, d_o), (params, _, dtype, sizes, interpret) = arrays, call
    (B, S, N, _), T = q.shape, k.shape[1]
    block_q = ROWS * WARPGROUPS
    inputs = {"q": q, "k": k, "v": v, "d_o": d_o, **_filled(lse, delta, block_q)}
    inputs |= parts.list_mask_inputs(operands, params, block_q, sizes.k)
    if gpu_blocks.needs_mask(params, operands, T, sizes.k):
        inputs["visits"] = gpu_blocks.plan_query_visits(S, T, block_q, sizes.k, operands, params)
    group = N // k.shape[2]
    s = HopperStatics(params, S, T, group, sizes.k, sizes.stages, tuple(inputs), bool(interpret))
    row = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    scratch = _scratch(s, q, ("q", "d_o"), ("k", "v"), row, 4)
    scratch |= parts.make_barriers(s, k=1 + s.has_segments, v=1)
    scratch |= parts.make_segment_buffers(s, "q", "k")
    scratch |= parts.make_staging_buffer("staged", dtype, q.dtype)
    shapes = (jax.ShapeDtypeStruct(q.shape, dtype),)
    grid = N, pl.cdiv(S, block_q), B
    (out,) = parts.run_kernel(_d_q_kernel, s, inputs, shapes, scratch, grid, interpret)
    return out


def compute_d_kv(
    arrays: BackwardArrays, operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Computes dK, dV summed over a kv head's query heads, from what :func:`compute_d_q` takes."""
    (q, k, v, lse, delta, d_o), (params, _, dtype, sizes, interpret) = arrays, call
    (B, S, N, _), (T, K) = q.shape, k.shape[1:3]
    block_k = ROWS * WARPGROUPS
    inputs = {"q": q, "k": k, "v": v, "d_o": d_o, **_filled(lse, delta, sizes.q)}
    inputs |= parts.list_mask_inputs(operands, params, sizes.q, block_k)
    # Slots past the last key need no mask: they add to no other key's gradient.
    if gpu_blocks.needs_mask(params, operands, block_k, block_k):
        inputs["visits"] = gpu_blocks.plan_key_visits(S, T, sizes.q, block_k, operands, params)
    s = HopperStatics(params, S, T, N // K, sizes.q, sizes.stages, tuple(inputs), bool(interpret))
    row = plgpu.SMEM((s.stages, s.block), jnp.float32)
    scratch = _scratch(s, q, ("k", "v"), ("q", "d_o"), row, 2)
    scratch |= parts.make_barriers(s, q=2 + s.has_segments, d_o=2)
    scratch |= parts.make_segment_buffers(s, "k", "q")
    scratch |= parts.make_staging_buffer("staged", dtype, q.dtype)
    shapes = tuple(jax.ShapeDtypeStruct(k.shape, dtype) for _ in range(2))
    grid = K, pl.cdiv(T, block_k), B
    d_k, d_v = parts.run_kernel(_d_kv_kernel, s, inputs, shapes, scratch, grid, interpret)
    return d_k, d_v


def _scratch(s: HopperStatics, q, own, visited, row, arrivals: int) -> dict[str, Any]:
    """Buffers of a warpgroup's own rows and of the blocks that they visit, ``row`` for each of
    log-sum-exps and deltas, and the barrier of the own ones."""
    H = q.shape[3]
    rows = plgpu.SMEM((WARPGROUPS, ROWS, H), q.dtype, transforms=parts.SWIZZLED)
    blocks = plgpu.SMEM((s.stages, s.block, H), q.dtype, transforms=parts.SWIZZLED)
    ready = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=arrivals + s.has_segments)
    buffers = dict.fromkeys(own, rows) | dict.fromkeys(visited, blocks)
    return buffers | {"lse": row, "delta": row, "own_ready": ready}


def _filled(lse: jax.Array, delta: jax.Array, block: int) -> dict[str, jax.Array]:
    """Whole blocks of queries, those past the last with no weight."""
    pad = (0, 0), (0, 0), (0, -lse.shape[2] % block)
    return {"lse": jnp.pad(lse, pad, constant_values=jnp.inf), "delta": jnp.pad(delta, pad)}


def _d_q_kernel(s: HopperStatics, refs, outputs, shared) -> None:
    copy = partial(parts.copy_key_value_blocks, s, refs, shared)
    multiply = partial(_sum_d_q, s, refs, outputs, shared)
    parts.run_warpgroups(s, refs, copy, multiply, last_first=s.params.causal)


def _sum_d_q(s: HopperStatics, refs, outputs, shared, visits, row, head, start, me) -> None:
    """64 queries from ``start``."""
    mine, H, block_k = pl.ds(start, ROWS), shared["q"].shape[-1], s.block
    sources = {name: refs[name].at[row, mine, head] for name in ("q", "d_o")}
    sources |= {name: refs[name].at[row, head, mine] for name in ("lse", "delta")}
    if s.has_segments:
        sources["q_segments"] = refs["q_segments"].at[row, mine]
    parts.copy_own_tiles(shared, "own_ready", me, sources)

    def own(name):
        x = parts.load_shared(shared[name].at[me], parts.ALONG_ROWS)
        return parts.broadcast_rows(x, block_k)

    def step(at, d_q, masked):
        slot = lax.rem(at, jnp.int32(s.stages))
        for name in ("k", "v"):
            plgpu.barrier_wait(shared[f"{name}_ready"].at[slot])
        k = shared["k"].at[slot]
        products = parts.multiply_transposed(shared["q"].at[me], k, lambda: None)
        segments = ()
        if masked and s.has_segments:
            other = parts.load_shared(shared["k_segments"].at[slot], parts.ALONG_COLUMNS)
            segments = own("q_segments"), parts.broadcast_columns(other, ROWS)
        d_o, v = shared["d_o"].at[me], shared["v"].at[slot]
        d_weights = parts.multiply_transposed(d_o, v, lambda: None)
        parts.release_slot(s, shared["v_free"].at[slot])
        starts = start, block_of(at) * block_k
        tile = HopperScoreTile(s, refs, (ROWS, block_k), 0, starts, (row, head))
        scores, slope = tile.scores(products)
        seen = tile.compute_mask(*segments) if masked else None
        _, d_scores = compute_weights_and_d_scores(
            scores, slope, own("lse"), d_weights, own("delta"), seen, s.exp2_scale
        )
        d_q = parts.add_product(s, d_q, d_scores.astype(k.dtype), k)
        parts.release_slot(s, shared["k_free"].at[slot])
        return d_q

    masked, count, block_of = parts.order_visits(visits, pl.cdiv(s.T, block_k))
    d_q = parts.visit_visible_blocks(visits, masked, count, step, parts.make_zeros(ROWS, H))
    staged = shared.get("staged", shared["q"]).at[me]
    parts.store_tile(staged, outputs[0].at[row, mine, head], d_q * s.params.scale)


def _d_kv_kernel(s: HopperStatics, refs, outputs, shared) -> None:
    copy = partial(_copy_queries, s, refs, shared)
    multiply = partial(_sum_d_kv, s, refs, outputs, shared)
    parts.run_warpgroups(s, refs, copy, multiply, last_first=False)


def _each(s: HopperStatics, visits, body, carry):
    """``body(at, member, block, masked, carry)`` over what a block of keys visits: each query head
    of the group makes all visits with a mask, then each all others. ``at`` counts."""
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
        slot = lax.rem(at, jnp.int32(s.stages))
        head, queries = kv_head * s.group + member, pl.ds(block * s.block, s.block)
        for name, beside in (("q", "lse"), ("d_o", "delta")):
            copies = [
                (refs[name].at[row, queries, head], shared[name]),
                (refs[beside].at[row, head, queries], shared[beside]),
            ]
            if name == "q" and s.has_segments:
                copies.append((refs["q_segments"].at[row, queries], shared["q_segments"]))
            parts.copy_block(s, shared, name, at, slot, copies)
        return carry

    _each(s, visits, copy, None)


def _sum_d_kv(s: HopperStatics, refs, outputs, shared, visits, row, kv_head, start, me) -> None:
    """64 keys from ``start``. Tiles are transposed, [keys, queries]."""
    mine, H, block_q = pl.ds(start, ROWS), shared["k"].shape[-1], s.block
    sources = {name: refs[name].at[row, mine, kv_head] for name in ("k", "v")}
    if s.has_segments:
        sources["k_segments"] = refs["k_segments"].at[row, mine]
    parts.copy_own_tiles(shared, "own_ready", me, sources)

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
        tile = HopperScoreTile(s, refs, (ROWS, block_q), 1, (block * block_q, start), at_head)
        scores, slope = tile.scores(products)
        seen, segments = None, ()
        if masked:
            if s.has_segments:
                own = parts.load_shared(shared["k_segments"].at[me], parts.ALONG_ROWS)
                segments = beside("q_segments"), parts.broadcast_rows(own, block_q)
            seen = tile.compute_mask(*segments)
        weights, d_scores = compute_weights_and_d_scores(
            scores, slope, beside("lse"), d_weights, beside("delta"), seen, s.exp2_scale
        )
        d_v = parts.add_product(s, d_v, weights.astype(d_o.dtype), d_o)
        parts.release_slot(s, shared["d_o_free"].at[slot])
        d_k = parts.add_product(s, d_k, d_scores.astype(q.dtype), q)
        parts.release_slot(s, shared["q_free"].at[slot])
        return d_k, d_v

    d_k, d_v = _each(s, visits, step, (parts.make_zeros(ROWS, H), parts.make_zeros(ROWS, H)))
    target = (row, mine, kv_head)
    for name, ref, x in (("k", outputs[0], d_k * s.params.scale), ("v", outputs[1], d_v)):
        parts.store_tile(shared.get("staged", shared[name]).at[me], ref.at[target], x)
