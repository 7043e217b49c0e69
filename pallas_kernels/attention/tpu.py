"""Attention on a TPU: operands laid out for the kernels, and results laid back."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

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
    TpuBlockSizes,
    count_keys_in_vmem,
    count_value_and_sum_rows,
    vmem_bytes,
)
from pallas_kernels.attention.tpu_scores import KernelStatics
from pallas_kernels.attention.tuned import choose_blocks, name_mask_kind
from pallas_kernels.attention.walk import KeyWalk, make_walk_table, plan_walk
from pallas_kernels.chips import get_chip, round_up
from pallas_kernels.kernel_types import Interpret

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


BlockedOperand = tuple[pl.BlockSpec | None, jax.Array | None]
"""A block's spec, and the array; None: the kernel has None there."""
Scratch = pl.MemoryRef | list[pl.MemoryRef] | None
"""Scratch memory of a kernel: one array, one for each tile in flight, or none."""
GradientSums = tuple[jax.Array | None, jax.Array | None, jax.Array | None]
"""dQ, dK and dV of the parts of keys so far; None: there was no part."""


class BlockedResult(NamedTuple):
    """An array that a kernel writes block by block."""

    spec: pl.BlockSpec
    shape: tuple[int, ...]
    dtype: DTypeLike


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
        T = part.num_keys
        operands = part.operands
        params = part.params
        blocks = part.blocks
        B, S, N, _ = operands.q.shape
        kv_heads = operands.k.shape[2]
        walk = plan_walk(
            S,
            T,
            params,
            operands,
            (blocks.q, blocks.k),
            (blocks.tile_q, blocks.tile_k),
            join_tiles=join_tiles,
        )
        q_first = sum_offsets(params.q_offset, operands.q_offset)
        k_first = sum_offsets(params.k_offset, operands.k_offset)
        qk_offset = q_first - k_first
        is_static = isinstance(qk_offset, int)
        table = make_walk_table(walk, S, T, params, operands)
        # See `ProgramScalars`: the offset, two zeros, each row's prefix.
        ints = jnp.zeros(3 + B, jnp.int32)
        if not is_static:
            ints = ints.at[0].set(qk_offset)
        if operands.prefix is not None:
            ints = ints.at[3:].set(operands.prefix - k_first)
        floats = jnp.stack(
            [
                jnp.zeros(N, F32) if terms is None else terms.astype(F32)
                for terms in (operands.slopes, operands.sinks)
            ]
        )
        # Where there are edges, their tiles end with the keys: no score needs a mask.
        has_padding = T % walk.bk and not walk.edges
        statics = KernelStatics(
            params=params,
            kv_heads=kv_heads,
            group=N // kv_heads,
            qk_offset=qk_offset if is_static else None,
            num_keys=T if has_padding else None,
            num_tables=len(table),
            has_prefix=operands.prefix is not None,
            has_slopes=operands.slopes is not None,
            has_sinks=operands.sinks is not None,
        )
        return cls(walk, statics, part, (table, ints, floats))

    @property
    def padded_q_len(self) -> int:
        return self.walk.nq * self.walk.bq

    def pad_segments(self) -> list[BlockedOperand]:
        """Returns int32 [B, 1, queries] and [B, 1, keys], with their blocks; −1 for
        queries that see nothing."""
        q_segments = self.part.operands.q_segments
        k_segments = self.part.operands.k_segments
        if q_segments is None or k_segments is None:
            return [(None, None)] * 2
        q_segments = jnp.where(q_segments == 0, -1, q_segments)[:, None]
        k_segments = k_segments[:, None]
        q_segments = _pad_last_axis(q_segments, self.padded_q_len, -1)
        k_segments = _pad_last_axis(k_segments, self.part.num_rows, 0)
        return [
            (self.query_row_spec(shared=True), q_segments),
            (self.key_row_spec(), k_segments),
        ]

    def query_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of a block of queries of one head, ``width`` features."""
        group = self.statics.group

        def index(kv, g, i, *_):
            return kv * group + g, i, 0

        return pl.BlockSpec((None, self.walk.bq, width), index)

    def key_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of all parts' keys."""
        part_index = self.part.index

        def index(kv, g, i, *_):
            return kv, part_index, 0

        return pl.BlockSpec((None, self.part.num_rows, width), index)

    def query_row_spec(self, shared: bool = False) -> pl.BlockSpec:
        """Returns the spec of one number a query; ``shared``: the same for all
        heads."""
        group = self.statics.group
        heads = self.statics.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads) if shared else kv * group + g, 0, i

        return pl.BlockSpec((None, 1, self.walk.bq), index)

    def key_row_spec(self) -> pl.BlockSpec:
        """Returns the spec of one number a key, the same for all heads."""
        heads = self.statics.kv_heads

        def index(kv, g, i, *_):
            return lax.div(kv, heads), 0, 0

        return pl.BlockSpec((None, 1, self.part.num_rows), index)

    def estimate_cost(
        self,
        products: int,
        arrays: list[jax.Array | None],
        results: list[BlockedResult],
    ) -> pl.CostEstimate:
        """Estimates the cost of queries with the keys that they see, segments aside, at
        ``products`` multiplications a pair; bytes are of whole arrays, too many where
        keys go in parts."""
        B, S, N, _ = self.part.operands.q.shape
        pairs_per_head = _count_pairs(
            S, self.part.num_keys, self.part.params, self.statics.qk_offset
        )
        pairs = B * N * pairs_per_head
        read = sum(array.nbytes for array in arrays if array is not None)
        written = sum(
            math.prod(result.shape) * jnp.dtype(result.dtype).itemsize
            for result in results
        )
        return pl.CostEstimate(
            flops=2 * products * pairs,
            bytes_accessed=read + written,
            transcendentals=pairs,
        )

    def run(
        self,
        body: Callable[..., None],
        operands: list[BlockedOperand],
        results: list[BlockedResult],
        scratch: list[Scratch],
        products: int,
        interpret: Interpret,
        name: str,
        continued: Sequence[BlockedOperand] = (),
    ) -> list[jax.Array]:
        """Runs the kernel over (kv heads of all rows) × (query heads of one) × (blocks
        of queries).

        Args:
            operands: blocks and arrays; None: the kernel has None there.
            scratch: memory, or None, in the kernel's order.
            products: multiplications for a query and a key.
            continued: the last operands, one for each result: what other parts left
                there.
        """
        operands = [*operands, *continued]
        specs = [spec if array is not None else None for spec, array in operands]
        arrays = [array for _, array in operands]
        inputs = [*self.scalars, *arrays]
        # What goes on is written where it was read. Aliases count arrays alone.
        aliases = {}
        num_others = len(inputs) - len(continued)
        input_index = sum(array is not None for array in inputs[:num_others])
        pairs = zip(continued, results, strict=False)
        for result_index, ((_, earlier), result) in enumerate(pairs):
            if earlier is None:
                continue
            if earlier.dtype == result.dtype:
                aliases[input_index] = result_index
            input_index += 1
        statics = self.statics._replace(interpret=bool(interpret))
        vmem = self.part.vmem_bytes
        # A quarter and 4 MiB more than is counted.
        limit = min(vmem + vmem // 4 + (4 << 20), get_chip().vmem_bytes)
        num_kv_heads = len(self.part.operands.q) * statics.kv_heads
        return pl.pallas_call(
            partial(body, walk=self.walk, statics=statics, blocks=self.part.blocks),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=(num_kv_heads, statics.group, self.walk.nq),
                in_specs=specs,
                out_specs=[result.spec for result in results],
                scratch_shapes=scratch,
            ),
            out_shape=[
                jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results
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
        )(*inputs)


def _count_pairs(S: int, T: int, params: AttentionParams, shift: int | None) -> int:
    """Counts the pairs of a query and a key that causality and window allow, as far as
    static."""
    if not params.causal or shift is None:
        return S * T
    # Query s sees keys first..last, whose bounds grow by one from query to query.
    position = np.arange(S) + shift
    last = np.minimum(position, T - 1)
    first = np.zeros(S, int)
    if params.window is not None:
        first = np.maximum(position - params.window + 1, 0)
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
    parts = _list_key_parts(FORWARD, operands, call)
    num_rows = len(parts) * parts[0].num_rows
    k = _move_heads_first(operands.k, num_rows)
    v = _move_heads_first(operands.v, num_rows)
    dtype = call.dtype if len(parts) == 1 else F32
    results = [_forward(k, v, part, dtype, call.interpret) for part in parts]
    o, lse = reduce(merge_attention, results)
    return o.astype(call.dtype), lse


def _forward(
    k: jax.Array, v: jax.Array, part: KeyPart, dtype: DTypeLike, interpret: Interpret
) -> tuple[jax.Array, jax.Array]:
    """o [B, S, N, Hv] in ``dtype`` and lse [B, S, N], over a part of the keys."""
    q = part.operands.q
    blocks = part.blocks
    B, S, N, H = q.shape
    Hv = v.shape[-1]
    call = TpuKernelCall.of(part, join_tiles=True)
    bq = blocks.q
    slots = blocks.tiles_in_flight
    tile = (blocks.k, blocks.tile_q)
    turned_rows = count_value_and_sum_rows(Hv)
    segment_ids = None
    if call.walk.compares_segments:
        segment_ids = pltpu.VMEM((blocks.k, LANES), jnp.int32)
    o, lse = call.run(
        tpu_forward.forward_kernel,
        operands=[
            (call.query_spec(H), _move_heads_first(q, call.padded_q_len)),
            (call.key_spec(H), k),
            (call.key_spec(Hv), v),
            *call.pad_segments(),
        ],
        results=[
            BlockedResult(call.query_spec(Hv), (B * N, call.padded_q_len, Hv), dtype),
            BlockedResult(call.query_row_spec(), (B * N, 1, call.padded_q_len), F32),
        ],
        scratch=[
            pltpu.VMEM((SUBLANES, bq), F32),
            pltpu.VMEM((turned_rows, bq), F32),
            pltpu.VMEM((turned_rows, part.num_rows), v.dtype),
            segment_ids,
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
    parts = _list_key_parts(BACKWARD, operands, call)
    rows = round_up(S, parts[0].blocks.q)
    keys = len(parts) * parts[0].num_rows
    # +inf where no key is left: its weights are then exp(score − inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    laid_out = (
        _move_heads_first(q, rows),
        _move_heads_first(k, keys),
        _move_heads_first(v, keys),
        _move_heads_first(d_o, rows),
        _move_heads_first(lse, rows, jnp.inf)[:, None],
        _move_heads_first(delta, rows)[:, None],
    )
    d_q: jax.Array | None = None
    d_k: jax.Array | None = None
    d_v: jax.Array | None = None
    for part in parts:
        d_q_dtype = call.dtype if part is parts[-1] else F32
        d_q, d_k, d_v = _backward(
            laid_out,
            part,
            (d_q, d_k, d_v),
            d_q_dtype,
            call.dtype,
            interpret=call.interpret,
        )
    assert d_q is not None
    assert d_k is not None
    assert d_v is not None
    return (
        _move_heads_back(d_q, B, S),
        _move_heads_back(d_k, B, T),
        _move_heads_back(d_v, B, T),
    )


def _backward(
    laid_out: tuple[jax.Array, ...],
    part: KeyPart,
    sums: GradientSums,
    d_q_dtype: DTypeLike,
    d_kv_dtype: DTypeLike,
    *,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV as the kernel writes them: dQ of the keys so far, dK and dV so far
    as these.

    Args:
        laid_out: q, k, v, d_o, log-sum-exps and deltas as the kernel reads them.
        sums: what this returned for the part before, if any.
    """
    q, k, v, d_o, lse, delta = laid_out
    d_q, d_k, d_v = sums
    H = q.shape[-1]
    Hv = v.shape[-1]
    blocks = part.blocks
    call = TpuKernelCall.of(part, join_tiles=False)
    slots = blocks.tiles_in_flight
    tile = (blocks.tile_k, blocks.tile_q)
    # dK and dV of the parts before stay where they are: the kernel neither reads nor
    # writes them.
    untouched = pl.BlockSpec(memory_space=pl.ANY)
    # Derivatives of scores, which only a cap makes other than 1.
    derivatives = None
    if part.params.soft_cap is not None:
        (derivatives,) = _tiles(slots, tile, F32)
    d_q, d_k, d_v = call.run(
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
            BlockedResult(call.query_spec(H), q.shape, d_q_dtype),
            BlockedResult(call.key_spec(H), k.shape, d_kv_dtype),
            BlockedResult(call.key_spec(Hv), v.shape, d_kv_dtype),
        ],
        continued=[(call.query_spec(H), d_q), (untouched, d_k), (untouched, d_v)],
        scratch=[
            pltpu.VMEM((H, blocks.q), F32),
            pltpu.VMEM((part.num_rows, H), F32),
            pltpu.VMEM((part.num_rows, Hv), F32),
            *_tiles(slots, tile, F32, F32),
            derivatives,
            *_tiles(slots, tile, q.dtype, q.dtype),
        ],
        products=3 * H + 2 * Hv,
        interpret=interpret,
        name="attention_backward",
    )
    return d_q, d_k, d_v


def _tiles(
    slots: int, shape: tuple[int, int], *dtypes: DTypeLike
) -> list[list[pl.MemoryRef]]:
    """Scratch of so many tiles, for each dtype: every tile its own, so that the
    compiler sees that they are apart."""
    return [
        [pltpu.VMEM((1, *shape), jnp.dtype(dtype)) for _ in range(slots)]
        for dtype in dtypes
    ]


def _list_key_parts(
    direction: str, operands: AttentionOperands, call: AttentionCall
) -> list[KeyPart]:
    """Lists runs of as many keys as VMEM holds in a pass; sinks go with the first."""
    sizes = AttentionSizes.of(operands, call.dtype)
    params = call.params
    override = cast(TpuBlockSizes | None, call.block_sizes)
    blocks = choose_blocks(direction, sizes, name_mask_kind(params, operands), override)
    num_rows = count_keys_in_vmem(direction, blocks, sizes, get_chip())
    vmem = vmem_bytes(direction, blocks, sizes, num_rows)
    parts = []
    T = sizes.T
    for index in range(-(-T // num_rows)):
        start = index * num_rows
        stop = min((index + 1) * num_rows, T)
        segments = operands.k_segments
        if segments is not None:
            segments = segments[:, start:stop]
        part = KeyPart(
            index,
            num_rows,
            num_keys=stop - start,
            operands=operands._replace(
                k_segments=segments, sinks=operands.sinks if index == 0 else None
            ),
            params=params._replace(k_offset=params.k_offset + start),
            blocks=blocks,
            vmem_bytes=vmem,
        )
        parts.append(part)
    return parts


def _move_heads_first(x: jax.Array, size: int, value: float = 0) -> jax.Array:
    """[B, S, N, ...] → [B · N, size, ...], ``value`` beyond S."""
    B, S, N, *features = x.shape
    padding = ((0, 0), (0, size - S), *((0, 0),) * (x.ndim - 2))
    x = jnp.pad(x, padding, constant_values=value)
    return x.swapaxes(1, 2).reshape(B * N, size, *features)


def _move_heads_back(x: jax.Array, B: int, S: int) -> jax.Array:
    """[B · N, size, ...] → [B, S, N, ...]."""
    _, size, *features = x.shape
    by_head = x.reshape(B, -1, size, *features)
    return by_head[:, :, :S].swapaxes(1, 2)
