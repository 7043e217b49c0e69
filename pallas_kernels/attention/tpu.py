"""Attention on a TPU: operands laid out for the kernels, and results laid back."""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_backward, tpu_forward
from pallas_kernels.attention.combine import merge_attention
from pallas_kernels.attention.params import (
    AttentionCall,
    AttentionOperands,
    AttentionParams,
    OutputArrays,
    sum_offsets,
)
from pallas_kernels.attention.tpu_blocks import (
    BACKWARD,
    FORWARD,
    LANES,
    SUBLANES,
    AttentionSizes,
    TpuBlocks,
    count_keys_in_vmem,
    count_value_and_sum_rows,
    vmem_bytes,
)
from pallas_kernels.attention.tpu_scores import KernelStatics
from pallas_kernels.attention.tuned import choose_blocks, name_mask_kind
from pallas_kernels.attention.walk import KeyWalk, make_walk_table, plan_walk
from pallas_kernels.chips import get_chip, round_up

F32 = jnp.float32


class KeyPart(NamedTuple):
    """A run of keys that VMEM holds, and how a pass works on them."""

    index: int
    num_rows: int
    """Rows in VMEM: block ``index`` of so many."""
    num_keys: int
    """Keys among these rows; the rest is padding."""
    operands: AttentionOperands
    """q, k and v as they came; the others of these keys."""
    params: AttentionParams
    blocks: TpuBlocks
    vmem_bytes: int


class TpuKernelCall(NamedTuple):
    """One kernel over all queries and a part of the keys."""

    walk: KeyWalk
    statics: KernelStatics
    part: KeyPart
    scalars: tuple[jax.Array, jax.Array, jax.Array]
    """The walk's table; int32 [3 + B], the shift where it is traced, two zeros and each
    row's prefix; fp32 [2, N], slopes and sinks."""

    @classmethod
    def of(cls, part: KeyPart, join_tiles: bool) -> "TpuKernelCall":
        """Plans the kernel of a part; ``join_tiles``: see :func:`walk.plan_walk`."""
        T, operands, params, blocks = (
            part.num_keys,
            part.operands,
            part.params,
            part.blocks,
        )
        B, S, N, _ = operands.q.shape
        kv_heads = operands.k.shape[2]
        walk = plan_walk(
            S, T, params, operands, blocks[:2], blocks[2:4], join_tiles=join_tiles
        )
        q_first = sum_offsets(params.q_offset, operands.q_offset)
        k_first = sum_offsets(params.k_offset, operands.k_offset)
        shift = q_first - k_first
        static = isinstance(shift, int)
        rows = make_walk_table(walk, S, T, params, operands)
        ints = jnp.zeros(3 + B, jnp.int32)
        if not static:
            ints = ints.at[0].set(shift)
        if operands.prefix is not None:
            ints = ints.at[3:].set(operands.prefix - k_first)
        floats = jnp.stack(
            [
                jnp.zeros(N, F32) if x is None else x.astype(F32)
                for x in (operands.slopes, operands.sinks)
            ]
        )
        statics = KernelStatics(
            params=params,
            kv_heads=kv_heads,
            group=N // kv_heads,
            qk_offset=shift if static else None,
            num_keys=T if T % walk.bk and not walk.edges else None,
            num_tables=len(rows),
            has_prefix=operands.prefix is not None,
            has_slopes=operands.slopes is not None,
            has_sinks=operands.sinks is not None,
        )
        return cls(walk, statics, part, (rows, ints, floats))

    @property
    def padded_q_len(self) -> int:
        return self.walk.nq * self.walk.bq

    def pad_segments(self) -> list[tuple[Any, Any]]:
        """Returns int32 [B, 1, queries] and [B, 1, keys], with their blocks; −1 for
        queries that see nothing."""
        own, keys = self.part.operands.q_segments, self.part.operands.k_segments
        if own is None or keys is None:
            return [(None, None)] * 2
        own, keys = jnp.where(own == 0, -1, own)[:, None], keys[:, None]
        return [
            (
                self.query_row_spec(shared=True),
                _pad_last_axis(own, self.padded_q_len, -1),
            ),
            (self.key_row_spec(), _pad_last_axis(keys, self.part.num_rows, 0)),
        ]

    def query_spec(self, width: int) -> pl.BlockSpec:
        group = self.statics.group
        return pl.BlockSpec(
            (None, self.walk.bq, width), lambda kv, g, i, *_: (kv * group + g, i, 0)
        )

    def key_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of all parts' keys."""
        index = self.part.index
        return pl.BlockSpec(
            (None, self.part.num_rows, width), lambda kv, g, i, *_: (kv, index, 0)
        )

    def query_row_spec(self, shared: bool = False) -> pl.BlockSpec:
        """Returns the spec of one number a query; ``shared``: the same for all
        heads."""
        group, heads = self.statics.group, self.statics.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row_spec(self) -> pl.BlockSpec:
        heads = self.statics.kv_heads
        return pl.BlockSpec(
            (None, 1, self.part.num_rows),
            lambda kv, g, i, *_: (lax.div(kv, heads), 0, 0),
        )

    def estimate_cost(self, products: int, arrays, results) -> pl.CostEstimate:
        """Estimates the cost of queries with the keys that they see, segments aside, at
        ``products`` multiplications a pair; bytes are of whole arrays, too many where
        keys go in parts."""
        B, S, N, _ = self.part.operands.q.shape
        pairs = (
            B
            * N
            * _count_pairs(
                S, self.part.num_keys, self.part.params, self.statics.qk_offset
            )
        )
        read = sum(x.nbytes for x in arrays if x is not None)
        written = sum(
            math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in results
        )
        return pl.CostEstimate(
            flops=2 * products * pairs,
            bytes_accessed=read + written,
            transcendentals=pairs,
        )

    def run(
        self, body, operands, results, scratch, products, interpret, name, continued=()
    ):
        """Runs the kernel over (kv heads of all rows) × (query heads of one) × (blocks
        of queries).

        Args:
            operands: (block, array) or, for what the kernel is not given, (anything,
                None).
            results: (block, shape, dtype).
            products: multiplications for a query and a key.
            continued: the last operands, one for each result: what other parts left
                there.
        """
        operands = [*operands, *continued]
        specs = [spec if x is not None else None for spec, x in operands]
        arrays = [x for _, x in operands]
        given = [*self.scalars, *arrays]
        # What goes on is written where it was read.
        aliases = {}
        at = sum(x is not None for x in given[: len(given) - len(continued)])
        for n, ((_, before), (_, _, dtype)) in enumerate(
            zip(continued, results, strict=False)
        ):
            if before is not None and before.dtype == dtype:
                aliases[at] = n
            at += before is not None
        statics = self.statics._replace(interpret=bool(interpret))
        vmem = self.part.vmem_bytes
        limit = min(vmem + vmem // 4 + (4 << 20), get_chip().vmem_bytes)
        return pl.pallas_call(
            partial(body, walk=self.walk, statics=statics, blocks=self.part.blocks),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=(
                    len(self.part.operands.q) * statics.kv_heads,
                    statics.group,
                    self.walk.nq,
                ),
                in_specs=specs,
                out_specs=[spec for spec, *_ in results],
                scratch_shapes=scratch,
            ),
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results
            ],
            input_output_aliases=aliases,
            cost_estimate=self.estimate_cost(products, arrays, results),
            compiler_params=pltpu.CompilerParams(
                # The cores of a chip share out the kv heads. What follows sums up over
                # queries.
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=limit,
            ),
            interpret=interpret,
            name=name,
        )(*given)


def _count_pairs(S: int, T: int, params: AttentionParams, shift: int | None) -> int:
    """Counts the pairs of a query and a key that causality and window allow, as far as
    static."""
    if not params.causal or shift is None:
        return S * T
    # Query s sees keys first..last, whose bounds grow by one from query to query.
    last = np.minimum(np.arange(S) + shift, T - 1)
    first = (
        0
        if params.window is None
        else np.maximum(np.arange(S) + shift - params.window + 1, 0)
    )
    return int(np.maximum(last - first + 1, 0).sum())


def _pad_last_axis(x: jax.Array, size: int, value: int) -> jax.Array:
    """Pads [B, 1, n] up to ``size`` along the last axis."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[-1])), constant_values=value)


def supports(operands: AttentionOperands, params: AttentionParams) -> bool:
    """Supports everything but queries or keys at arbitrary positions, and learned
    biases."""
    return operands.q_positions is None and operands.biases is None


def forward(
    operands: AttentionOperands, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass as :mod:`api` calls it. Keys that VMEM does not hold at
    once are taken in parts, whose results are merged."""
    parts = _parts(FORWARD, operands, call)
    k, v = (_move_heads_first(x, len(parts) * parts[0].num_rows) for x in operands[1:3])
    out = call.dtype if len(parts) == 1 else F32
    results = [_forward(k, v, part, out, call.interpret) for part in parts]
    o, lse = reduce(merge_attention, results)
    return o.astype(call.dtype), lse


def _forward(k, v, part, dtype, interpret):
    q, blocks = part.operands.q, part.blocks
    B, S, N, H = q.shape
    Hv = v.shape[-1]
    call = TpuKernelCall.of(part, join_tiles=True)
    bq = blocks.q
    slots = blocks.tiles_in_flight
    tile = (blocks.k, blocks.tile_q)
    o, lse = call.run(
        tpu_forward.forward_kernel,
        operands=[
            (call.query_spec(H), _move_heads_first(q, call.padded_q_len)),
            (call.key_spec(H), k),
            (call.key_spec(Hv), v),
            *call.pad_segments(),
        ],
        results=[
            (call.query_spec(Hv), (B * N, call.padded_q_len, Hv), dtype),
            (call.query_row_spec(), (B * N, 1, call.padded_q_len), F32),
        ],
        scratch=[
            pltpu.VMEM((SUBLANES, bq), F32),
            pltpu.VMEM((count_value_and_sum_rows(Hv), bq), F32),
            pltpu.VMEM((count_value_and_sum_rows(Hv), part.num_rows), v.dtype),
            pltpu.VMEM((blocks.k, LANES), jnp.int32)
            if call.walk.compares_segments
            else None,
            *_tiles(slots, tile, F32),
            *_tiles(slots, (SUBLANES, blocks.tile_q), F32, F32),
            *_tiles(slots, tile, v.dtype),
        ],
        products=H + Hv,
        interpret=interpret,
        name="attention_forward",
    )
    return _move_heads_back(o, B, S), _move_heads_back(lse[:, 0], B, S)


def backward(
    operands: AttentionOperands, saved: OutputArrays, call: AttentionCall
) -> tuple[jax.Array, ...]:
    """Runs the backward pass as :mod:`api` calls it. Keys that VMEM does not hold at
    once are taken in parts, where they lie: each adds to dQ, and writes its own of dK
    and dV."""
    q, k, v, *_ = operands
    lse, delta, d_o = saved
    B, S = q.shape[:2]
    T = k.shape[1]
    parts = _parts(BACKWARD, operands, call)
    rows = round_up(S, parts[0].blocks.q)
    keys = len(parts) * parts[0].num_rows
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    laid_out = (
        _move_heads_first(q, rows),
        _move_heads_first(k, keys),
        _move_heads_first(v, keys),
        _move_heads_first(d_o, rows),
        _move_heads_first(lse, rows, jnp.inf)[:, None],
        _move_heads_first(delta, rows)[:, None],
    )
    sums: tuple[Any, Any, Any] = (None, None, None)
    for part in parts:
        dtypes = (call.dtype if part is parts[-1] else F32), call.dtype
        sums = _backward(laid_out, part, sums, dtypes, call.interpret)
    return tuple(
        _move_heads_back(x, B, size) for x, size in zip(sums, (S, T, T), strict=True)
    )


def _backward(saved, part, sums, dtypes, interpret):
    """dQ, dK and dV as the kernel writes them: dQ of the keys so far, dK and dV so far
    as these.

    Args:
        saved: q, k, v, d_o, log-sum-exps and deltas as the kernel reads them.
        sums: what this returned for the part before, if any.
        dtypes: of dQ, and of dK and dV.
    """
    (q, k, v, d_o, lse, delta), (d_q, d_k, d_v) = saved, sums
    H = q.shape[-1]
    Hv = v.shape[-1]
    blocks = part.blocks
    call = TpuKernelCall.of(part, join_tiles=False)
    slots = blocks.tiles_in_flight
    tile = (blocks.tile_k, blocks.tile_q)
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
            *call.pad_segments(),
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
        products=3 * H + 2 * Hv,
        interpret=interpret,
        name="attention_backward",
    )


def _tiles(slots: int, shape: tuple[int, int], *dtypes: Any) -> list[list[Any]]:
    """Scratch of so many tiles, for each dtype: every tile its own, so that the
    compiler sees that they are apart."""
    return [[pltpu.VMEM((1, *shape), dtype) for _ in range(slots)] for dtype in dtypes]


def _parts(
    direction: str, operands: AttentionOperands, call: AttentionCall
) -> list[KeyPart]:
    """Runs of as many keys as VMEM holds in a pass; sinks go with the first."""
    sizes = AttentionSizes.of(operands, call.dtype)
    params = call.params
    blocks = choose_blocks(
        direction, sizes, name_mask_kind(params, operands), call.block_sizes
    )
    held = count_keys_in_vmem(direction, blocks, sizes, get_chip())
    vmem = vmem_bytes(direction, blocks, sizes, held)
    parts = []
    T = sizes.T
    for index in range(-(-T // held)):
        start = index * held
        stop = min((index + 1) * held, T)
        segments = (
            None if operands.k_segments is None else operands.k_segments[:, start:stop]
        )
        sinks = operands.sinks if index == 0 else None
        own = operands._replace(k_segments=segments, sinks=sinks)
        at = params._replace(k_offset=params.k_offset + start)
        parts.append(KeyPart(index, held, stop - start, own, at, blocks, vmem))
    return parts


def _move_heads_first(x: jax.Array, size: int, value: float = 0) -> jax.Array:
    """[B, S, N, ...] → [B · N, size, ...], ``value`` beyond S."""
    (B, S, N), rest = x.shape[:3], x.shape[3:]
    pad = (0, 0), (0, size - S), *((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=value)
    return x.swapaxes(1, 2).reshape(B * N, size, *rest)


def _move_heads_back(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, size, ...] → [B, S, N, ...]."""
    return x.reshape(B, -1, *x.shape[1:])[:, :, :S].swapaxes(1, 2)
