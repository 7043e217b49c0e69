"""Attention on a TPU: operands laid out for the kernels, and results laid back."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_backward, tpu_forward
from pallas_kernels.attention.combine import merge_attention
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    BackwardArrays,
)
from pallas_kernels.attention.tpu_blocks import (
    BACKWARD,
    FORWARD,
    LANES,
    SUBLANES,
    AttentionSizes,
    count_keys_in_vmem,
    count_value_and_sum_rows,
    vmem_bytes,
)
from pallas_kernels.attention.tpu_call import KeyPart, TpuKernelCall, pad_last_axis
from pallas_kernels.attention.tuned import choose_blocks, name_mask_kind
from pallas_kernels.chips import get_chip

F32 = jnp.float32


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, operands: AttentionOperands, params: AttentionParams
) -> bool:
    """Supports everything but queries or keys at arbitrary positions, and learned biases."""
    return all(x is None for x in (operands.q_positions, operands.k_positions, operands.biases))


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass as :mod:`api` calls it. Keys that VMEM does not hold at once are taken
    in parts, whose results are merged."""
    sizes = AttentionSizes.of(q, v, call.dtype)
    blocks = choose_blocks(FORWARD, sizes, name_mask_kind(call.params, operands), call.block_sizes)
    held = count_keys_in_vmem(FORWARD, blocks, sizes, get_chip())
    parts = _parts(k.shape[1], operands, call.params, held)
    k, v = (_heads_first(x, len(parts) * held) for x in (k, v))
    out = call.dtype if len(parts) == 1 else F32
    results = [_forward(q, k, v, sizes, part, out, blocks, call.interpret) for part in parts]
    o, lse = reduce(merge_attention, results)
    return o.astype(call.dtype), lse


def _forward(q, k, v, sizes, part, dtype, blocks, interpret):
    (B, S, N, H), Hv = q.shape, v.shape[-1]
    call = TpuKernelCall.of(q.shape, len(k) // B, part, blocks, join_tiles=True)
    bq, slots, tile = blocks.q, blocks.tiles_in_flight, (blocks.k, blocks.tile_q)
    o, lse = call.run(
        tpu_forward.forward_kernel,
        operands=[
            (call.query_spec(H), _heads_first(q, call.padded_q_len)),
            (call.key_spec(H), k),
            (call.key_spec(Hv), v),
            *call.segments,
        ],
        results=[
            (call.query_spec(Hv), (B * N, call.padded_q_len, Hv), dtype),
            (call.query_row_spec(), (B * N, 1, call.padded_q_len), F32),
        ],
        scratch=[
            pltpu.VMEM((SUBLANES, bq), F32),
            pltpu.VMEM((count_value_and_sum_rows(Hv), bq), F32),
            pltpu.VMEM((count_value_and_sum_rows(Hv), part.num_rows), v.dtype),
            pltpu.VMEM((blocks.k, LANES), jnp.int32) if call.walk.compares_segments else None,
            *_tiles(slots, tile, F32),
            *_tiles(slots, (SUBLANES, blocks.tile_q), F32, F32),
            *_tiles(slots, tile, v.dtype),
        ],
        vmem=vmem_bytes(FORWARD, blocks, sizes, part.num_rows),
        products=H + Hv,
        interpret=interpret,
        name="attention_forward",
    )
    return _heads_last(o, B, S), _rows_last(lse, B, S)


def backward(
    arrays: BackwardArrays, operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the backward pass as :mod:`api` calls it. Keys that VMEM does not hold at once are taken
    in parts, where they lie: each adds to dQ, and writes its own of dK and dV."""
    q, k, v, lse, delta, d_o = arrays
    (B, S), T = q.shape[:2], k.shape[1]
    sizes = AttentionSizes.of(q, v, call.dtype)
    blocks = choose_blocks(BACKWARD, sizes, name_mask_kind(call.params, operands), call.block_sizes)
    held = count_keys_in_vmem(BACKWARD, blocks, sizes, get_chip())
    parts = _parts(T, operands, call.params, held)
    rows = -(-S // blocks.q) * blocks.q
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    saved = (
        _heads_first(q, rows),
        _heads_first(k, len(parts) * held),
        _heads_first(v, len(parts) * held),
        _heads_first(d_o, rows),
        _rows_first(lse, rows, jnp.inf),
        _rows_first(delta, rows, 0.0),
    )
    sums: tuple[Any, Any, Any] = (None, None, None)
    for part in parts:
        dtypes = (call.dtype if part is parts[-1] else F32), call.dtype
        sums = _backward(q.shape, saved, sizes, part, sums, dtypes, blocks, call.interpret)
    d_q, d_k, d_v = sums
    return _heads_last(d_q, B, S), _heads_last(d_k, B, T), _heads_last(d_v, B, T)


def _backward(shape, saved, sizes, part, sums, dtypes, blocks, interpret):
    """dQ, dK and dV as the kernel writes them: dQ of the keys so far, dK and dV so far as these.

    Args:
        shape: of the queries.
        saved: q, k, v, d_o, log-sum-exps and deltas as the kernel reads them.
        sums: what this returned for the part before, if any.
        dtypes: of dQ, and of dK and dV.
    """
    (q, k, v, d_o, lse, delta), (d_q, d_k, d_v) = saved, sums
    H, Hv = q.shape[-1], v.shape[-1]
    call = TpuKernelCall.of(shape, len(k) // shape[0], part, blocks, join_tiles=False)
    slots, tile = blocks.tiles_in_flight, (blocks.tile_k, blocks.tile_q)
    kept = pl.BlockSpec(memory_space=pl.ANY)
    return call.run(
        tpu_backward.backward_kernel,
        operands=[
            (call.query_spec(H), q),
            (call.key_spec(H), k),
            (call.key_spec(Hv), v),
            (call.query_spec(Hv), d_o),
            (call.query_row_spec(), lse),
            (call.query_row_spec(), delta),
            *call.segments,
        ],
        results=[
            (call.query_spec(H), q.shape, dtypes[0]),
            (call.key_spec(H), k.shape, dtypes[1]),
            (call.key_spec(Hv), v.shape, dtypes[1]),
        ],
        continued=[(call.query_spec(H), d_q), (kept, d_k), (kept, d_v)],
        scratch=[
            pltpu.VMEM((H, blocks.q), F32),
            pltpu.VMEM((part.num_rows, H), F32),
            pltpu.VMEM((part.num_rows, Hv), F32),
            *_tiles(slots, tile, F32, F32),
            *(_tiles(slots, tile, F32) if part.params.soft_cap is not None else [None]),
            *_tiles(slots, tile, q.dtype, q.dtype),
        ],
        vmem=vmem_bytes(BACKWARD, blocks, sizes, part.num_rows),
        products=3 * H + 2 * Hv,
        interpret=interpret,
        name="attention_backward",
    )


def _tiles(slots: int, shape: tuple[int, int], *dtypes: Any) -> list[list[Any]]:
    """Scratch of so many tiles, for each dtype: every tile its own, so that the compiler sees that
    they are apart."""
    return [[pltpu.VMEM((1, *shape), dtype) for _ in range(slots)] for dtype in dtypes]


def _parts(
    T: int, operands: AttentionOperands, params: AttentionParams, held: int
) -> list[KeyPart]:
    """Runs of so many keys; sinks go with the first."""
    parts = []
    for index in range(-(-T // held)):
        start, stop = index * held, min((index + 1) * held, T)
        segments = None if operands.k_segments is None else operands.k_segments[:, start:stop]
        sinks = operands.sinks if index == 0 else None
        own = operands._replace(k_segments=segments, sinks=sinks)
        at = params._replace(k_offset=params.k_offset + start)
        parts.append(KeyPart(index, held, stop - start, own, at))
    return parts


def _heads_first(x: jax.Array, size: int) -> jax.Array:
    """[B, S, N, H] → [B · N, size, H], zeros beyond S."""
    B, S, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, size - S), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(B * N, size, H)


def _heads_last(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, size, H] → [B, S, N, H]."""
    x = x.reshape(B, -1, *x.shape[1:])[:, :, :S]
    return x.transpose(0, 2, 1, 3)


def _rows_first(x: jax.Array, size: int, value: float) -> jax.Array:
    """[B, S, N] → [B · N, 1, size]."""
    x = pad_last_axis(x.transpose(0, 2, 1), size, value)
    return x.reshape(-1, 1, size)


def _rows_last(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, 1, size] → [B, S, N]."""
    return x.reshape(B, -1, x.shape[-1])[:, :, :S].transpose(0, 2, 1)
