"""Attention for any NVIDIA card: Pallas kernels that Triton compiles.

Three kernels, each of one block of rows a program: the output (Dao 2023,
FlashAttention-2, algorithm 1), dQ, and dK with dV (algorithm 2, split in two so that no
sum is atomic and results repeat bit for bit). A program visits the blocks that
``gpu_blocks`` finds for it: first those that need a mask, then those that need none.

Scores are kept in base 2: exp2 is an instruction. Head sizes are cut into powers of
two, 192 into 128 and 64, which is what Triton's tiles may be.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.attention.gpu_blocks import LN2, LOG2E, compute_weights_and_d_scores
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    OutputArrays,
    merge_offsets,
)
from pallas_kernels.attention.triton_program import (
    TritonKernelCall,
    TritonProgram,
    TritonTiles,
    full_spec,
    multiply,
    multiply_transposed,
    split_head_dim,
    store_row,
    store_tile,
)
from pallas_kernels.kernel_types import Ref

# Compute capabilities with about 100 KB of shared memory for a block, not 163 or 227.
_SMALL = ("8.6", "8.7", "8.9", "11.0", "12.0", "12.1")


class TritonBlockSizes(NamedTuple):
    """Tiles of the three kernels."""

    forward: TritonTiles
    d_q: TritonTiles
    d_kv: TritonTiles


def _get_block_sizes(
    operands: AttentionOperands, call: AttentionCall
) -> TritonBlockSizes:
    """Returns the call's blocks, or those by rule.

    Raises:
        ValueError: blocks that Triton has not.
    """
    H = operands.q.shape[3]
    Hv = operands.v.shape[3]
    override = cast(TritonBlockSizes | None, call.block_sizes)
    sizes = override or default_block_sizes(H, Hv, operands.q.dtype)
    for q, k, warps, stages in sizes:
        # A power of two has one bit.
        are_powers_of_two = all(n > 0 and n & (n - 1) == 0 for n in (q, k, warps))
        if not are_powers_of_two or min(q, k) < 16 or stages < 1:
            raise ValueError(
                f"block_sizes of {q} queries, {k} keys, {warps} warps, {stages} "
                f"stages: powers of two, of queries and keys 16 or more, and a stage "
                f"or more"
            )
    return sizes


def supports(operands: AttentionOperands, params: AttentionParams) -> bool:
    """Returns whether operands are bf16, fp16 or fp32, q, k and v alike, and heads of
    256 at most (tiles hold whole heads), with positions in order and without learned
    biases."""
    q, k, v, *_ = operands
    return (
        q.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and q.dtype == k.dtype == v.dtype
        and max(q.shape[-1], v.shape[-1]) <= 256
        and q.size > 0 < v.size
        and operands.q_positions is None
        and operands.biases is None
    )


def default_block_sizes(H: int, Hv: int, dtype: DTypeLike) -> TritonBlockSizes:
    """Chooses blocks by rule: accumulators fit in registers, blocks in shared memory;
    for a card that is not here, an H100's."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    small_memory = capability in _SMALL
    # Before Hopper products are each warp's own, and take more registers.
    old = capability.startswith("8.")
    head_size = max(H, Hv)
    if jnp.dtype(dtype).itemsize > 2:
        rows = 64 if head_size <= 128 else 32
        if small_memory:
            rows //= 2
        columns = min(rows, 32)
        wide = TritonTiles(rows, columns, warps=4, stages=1)
        tall = TritonTiles(columns, rows, warps=4, stages=1)
        return TritonBlockSizes(forward=wide, d_q=wide, d_kv=tall)
    if head_size <= 64:
        return TritonBlockSizes(
            forward=TritonTiles(128, 64, warps=4, stages=3),
            d_q=TritonTiles(128, 64, warps=8, stages=2),
            d_kv=TritonTiles(64, 128, warps=8, stages=2),
        )
    if head_size <= 128:
        return TritonBlockSizes(
            forward=TritonTiles(128, 64, warps=8, stages=2 if small_memory else 3),
            d_q=TritonTiles(128, 64, warps=8, stages=2),
            d_kv=TritonTiles(32 if old else 64, 128, warps=8, stages=2),
        )
    if small_memory:
        return TritonBlockSizes(
            forward=TritonTiles(64, 32, warps=4, stages=1),
            d_q=TritonTiles(32, 32, warps=4, stages=1),
            d_kv=TritonTiles(32, 32, warps=4, stages=1),
        )
    if old:
        forward = TritonTiles(64, 32, warps=4, stages=2)
    else:
        forward = TritonTiles(128, 32, warps=8, stages=2)
    return TritonBlockSizes(
        forward=forward,
        d_q=TritonTiles(64, 32, warps=8, stages=2),
        d_kv=TritonTiles(32, 64, warps=8, stages=2),
    )


def forward(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Runs this pass as :mod:`api` calls it."""
    operands = merge_offsets(operands, call.params)
    B, S, N, _ = operands.q.shape
    Hv = operands.v.shape[3]
    sizes = _get_block_sizes(operands, call)
    run = TritonKernelCall(operands, call, sizes.forward, per_query=True)
    run.add(full_spec, sinks=operands.sinks)
    o, lse = run(
        _forward_kernel,
        ((B, S, N, Hv), call.dtype, run.query_spec),
        ((B, N, S), jnp.float32, run.query_row_spec),
    )
    return o, lse.transpose(0, 2, 1)


def backward(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs this pass as :mod:`api` calls it."""
    operands = merge_offsets(operands, call.params)
    dtype = call.dtype
    q = operands.q
    k = operands.k
    v = operands.v
    lse, delta, d_o = saved
    sizes = _get_block_sizes(operands, call)
    # +inf where no key is left: its weights are then exp2(score − inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E).transpose(0, 2, 1)
    delta = delta.transpose(0, 2, 1)
    d_o = d_o.astype(v.dtype)

    def plan(tiles: TritonTiles, *, per_query: bool) -> TritonKernelCall:
        run = TritonKernelCall(operands, call, tiles, per_query=per_query)
        run.add(run.query_spec, d_o=d_o)
        run.add(run.query_row_spec, lse=lse, delta=delta)
        return run

    run = plan(sizes.d_q, per_query=True)
    (d_q,) = run(_d_q_kernel, (q.shape, dtype, run.query_spec))
    run = plan(sizes.d_kv, per_query=False)
    d_k, d_v = run(
        _d_kv_kernel,
        (k.shape, dtype, run.key_spec),
        (v.shape, dtype, run.key_spec),
    )
    return d_q, d_k, d_v


def _forward_kernel(p: TritonProgram, o_ref: Ref, lse_ref: Ref) -> None:
    """One block of queries of one head: an online softmax over blocks of keys (Milakov
    & Gimelshein 2018)."""
    s = p.statics
    block_q = p.tiles.q
    block_k = p.tiles.k
    i = _last_first(p)
    head = p.head
    start = i * block_q

    # The block's queries stay in registers: [block_q, width] of each part of a head.
    q = p.load_rows("q", start, block_q, _bound(s.S, block_q))
    queries = p.load_token_block("q", start, 1)

    def body(j, _, masked, carry):
        """Adds block j of the keys to the online softmax: the sum of weighted values,
        the largest score and the sum of weights so far, in units of log2."""
        o, top, total = carry
        # Only the last block reaches past the last key, and it is masked.
        length = s.T if masked and s.T % block_k else None
        keys = p.load_token_block("k", j * block_k, 0)
        k = p.load_rows("k", j * block_k, block_k, length)

        # Scores [block_q, block_k], −inf where a query does not see a key.
        products = multiply_transposed(q, k)
        scores, _ = p.scores(products, queries, keys, head)
        if masked:
            mask = p.compute_mask(queries, keys)
            scores = jnp.where(mask, scores, -jnp.inf)

        # Weights by the largest score so far; earlier sums were by an earlier one, and
        # decay.
        block_top = jnp.max(scores, axis=1) * p.exp2_scale
        new_top = jnp.maximum(top, block_top)
        # Rows that have seen no key: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = p.exp2(scores * p.exp2_scale - base[:, None])
        decay = p.exp2(top - base)

        v = p.load_rows("v", j * block_k, block_k, length)
        o = tuple(
            earlier * decay[:, None] + multiply(weights.astype(part.dtype), part)
            for earlier, part in zip(o, v, strict=True)
        )
        total = total * decay + jnp.sum(weights, axis=1)
        return o, new_top, total

    # The softmax before the first key.
    o = _zeros(block_q, s.Hv)
    if "sinks" in p.refs:
        # As if a key with the sink's score had come first, and a value of zeros.
        top = jnp.full((block_q,), p.refs["sinks"][head] * LOG2E, jnp.float32)
        total = jnp.ones((block_q,), jnp.float32)
    else:
        top = jnp.full((block_q,), -jnp.inf)
        total = jnp.zeros((block_q,), jnp.float32)
    num_blocks = pl.cdiv(s.T, block_k)
    o, top, total = p.visit_visible_blocks(i, num_blocks, body, (o, top, total))

    # Results: zeros and −inf where a query has seen neither a key nor a sink.
    has_weight = total > 0
    inverse = 1 / jnp.where(has_weight, total, 1.0)
    lse = top * LN2 + jnp.log(jnp.where(has_weight, total, 1.0))
    lse = jnp.where(has_weight, lse, -jnp.inf)
    o = tuple(part * inverse[:, None] for part in o)
    store_tile(o_ref, o, start, block_q, s.S, s.Hv)
    store_row(lse_ref, lse, start, block_q, s.S)


def _d_q_kernel(p: TritonProgram, d_q_ref: Ref) -> None:
    """dQ of one block of queries of one head, over blocks of keys: the weights are
    computed again, from scores and log-sum-exps."""
    s = p.statics
    block_q = p.tiles.q
    block_k = p.tiles.k
    i = _last_first(p)
    head = p.head
    start = i * block_q

    # What belongs to the queries stays in registers.
    q = p.load_rows("q", start, block_q, _bound(s.S, block_q))
    d_o = p.load_rows("d_o", start, block_q, _bound(s.S, block_q))
    lse = p.load_row_scalars("lse", start, other=jnp.inf)[:, None]
    delta = p.load_row_scalars("delta", start, other=0.0)[:, None]
    queries = p.load_token_block("q", start, 1)

    def body(j, _, masked, d_q):
        """Adds block j of the keys to dQ, by dS·K."""
        # Only the last block reaches past the last key, and it is masked.
        length = s.T if masked and s.T % block_k else None
        keys = p.load_token_block("k", j * block_k, 0)
        k = p.load_rows("k", j * block_k, block_k, length)
        products = multiply_transposed(q, k)
        scores, derivative = p.scores(products, queries, keys, head)
        v = p.load_rows("v", j * block_k, block_k, length)
        mask = p.compute_mask(queries, keys) if masked else None
        d_weights = multiply_transposed(d_o, v)
        _, d_scores = compute_weights_and_d_scores(
            scores, derivative, lse, d_weights, delta, mask, p.exp2_scale, p.exp2
        )
        return _add_products(d_q, d_scores, k)

    num_blocks = pl.cdiv(s.T, block_k)
    d_q = p.visit_visible_blocks(i, num_blocks, body, _zeros(block_q, s.H))
    d_q = tuple(part * p.params.scale for part in d_q)
    store_tile(d_q_ref, d_q, start, block_q, s.S, s.H)


def _d_kv_kernel(p: TritonProgram, d_k_ref: Ref, d_v_ref: Ref) -> None:
    """One block of keys of one kv head: its group's query heads are summed here. Tiles
    of scores are transposed, [keys, queries], so that the weights are a product's left
    operand as they lie.
    """
    s = p.statics
    block_q = p.tiles.q
    block_k = p.tiles.k
    j = p.block
    kv_head = p.head
    start = j * block_k

    # The block's keys and values stay in registers.
    k = p.load_rows("k", start, block_k, _bound(s.T, block_k))
    v = p.load_rows("v", start, block_k, _bound(s.T, block_k))
    keys = p.load_token_block("k", start, 1)
    q_bound = _bound(s.S, block_q)

    def body(i, member, masked, carry):
        """Adds block i of the queries of one head to dK, by dSᵀ·Q, and to dV, by
        Pᵀ·dO."""
        d_k, d_v = carry
        q_start = i * block_q
        queries = p.load_token_block("q", q_start, 0)
        q = p.load_rows("q", q_start, block_q, q_bound, member)
        head = kv_head * s.group + member
        products = multiply_transposed(k, q)
        scores, derivative = p.scores(products, queries, keys, head)
        d_o = p.load_rows("d_o", q_start, block_q, q_bound, member)
        lse = p.load_row_scalars("lse", q_start, member, other=jnp.inf)[None]
        delta = p.load_row_scalars("delta", q_start, member, other=0.0)[None]
        mask = p.compute_mask(queries, keys) if masked else None
        d_weights = multiply_transposed(v, d_o)
        weights, d_scores = compute_weights_and_d_scores(
            scores, derivative, lse, d_weights, delta, mask, p.exp2_scale, p.exp2
        )
        d_v = _add_products(d_v, weights, d_o)
        d_k = _add_products(d_k, d_scores, q)
        return d_k, d_v

    num_blocks = pl.cdiv(s.S, block_q)
    zeros = _zeros(block_k, s.H), _zeros(block_k, s.Hv)
    d_k, d_v = p.visit_visible_blocks(j, num_blocks, body, zeros, repeats=s.group)
    d_k = tuple(part * p.params.scale for part in d_k)
    store_tile(d_k_ref, d_k, start, block_k, s.T, s.H)
    store_tile(d_v_ref, d_v, start, block_k, s.T, s.Hv)


def _add_products(
    sums: tuple[jax.Array, ...], left: jax.Array, right: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Adds left·right to sums, in each part of a head."""
    return tuple(
        total + multiply(left.astype(part.dtype), part)
        for total, part in zip(sums, right, strict=True)
    )


def _zeros(rows: int, H: int) -> tuple[jax.Array, ...]:
    """fp32 [rows, width] of each part of a head of H."""
    return tuple(
        jnp.zeros((rows, width), jnp.float32) for _, width in split_head_dim(H)
    )


def _bound(length: int, block: int) -> int | None:
    """The row past which a block reads zeros; None: blocks divide the length."""
    return length if length % block else None


def _last_first(p: TritonProgram) -> jax.Array:
    """The block of a program: with a causal mask the last blocks, the longest, start
    first."""
    return pl.num_programs(0) - 1 - p.block if p.params.causal else p.block
