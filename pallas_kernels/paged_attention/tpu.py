"""Paged attention on a TPU: a kernel that walks over blocks of queries of one row each,
decoding rows or chunks of prefill, and over each one's own pages.

Pages stay in HBM; those of a block, which the prefetched tables name, are copied while
the block before is computed, the next row's first ones too. All kv heads are computed
from one copy.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_blocks import LANES, SUBLANES
from pallas_kernels.chips import TpuChip, get_chip, round_up
from pallas_kernels.paged_attention.params import PagedOperands, PagedParams
from pallas_kernels.paged_attention.query_blocks import QueryBlocks, attend_in_blocks
from pallas_kernels.paged_attention.tpu_kernel import (
    COLUMNS,
    PagedKernelStatics,
    attend_query_blocks,
)

# Most keys of a block, and bytes of them and of their values. Each round waits once for
# its own sums, so that fewer are slower; but a row's last block is computed whole.
_DECODE_KEYS = 512
_DECODE_BYTES = 1 << 21
_CHUNK_KEYS = 1024
_CHUNK_BYTES = 1 << 22
_MIN_KEYS = 128
# Rows of a matrix of queries, over all kv heads: more read keys less often, and take
# more VMEM.
_QUERY_ROWS = 4096
_MAX_QUERIES = 128
# Of VMEM, for what is counted here.
_USABLE = 0.8
# Of scalar memory, for tables.
_TABLE_BYTES = 1 << 19


class TpuPagedBlocks(NamedTuple):
    """Sizes of blocks."""

    queries: int
    """Queries of a block of a row that is not uniform; a power of two."""
    keys: int
    """Keys of a block of its pages, whole pages."""
    uniform_keys: int
    """Keys of a block of uniform rows' pages, whole pages."""


def supports(operands: PagedOperands, params: PagedParams) -> bool:
    """Returns whether pages fill whole tiles of memory, tables no more than scalar
    memory, and nothing is learned by distance."""
    q, tables = operands.q, operands.page_tables
    tile = {"int8": 32, "uint8": 64, "bfloat16": 16, "float32": 8}
    for name, x in operands.page_arrays.items():
        if name.endswith("scale") and x.dtype not in (jnp.bfloat16, jnp.float32):
            return False
        kind = x.dtype.name
        if name.endswith("codes") and (
            kind not in tile or params.page_size % tile[kind]
        ):
            return False
        if name.endswith("codes") and x.dtype.itemsize > 1 and x.dtype != q.dtype:
            return False
    small = (
        pl.next_power_of_2(max(params.queries_each, 1)) * q.shape[1] <= 2 * _QUERY_ROWS
    )
    return (
        q.dtype in (jnp.bfloat16, jnp.float32)
        and operands.biases is None
        and tables.size * 4 <= _TABLE_BYTES
        and small
        and min(q.size, tables.size) > 0
    )


def choose_blocks(
    operands: PagedOperands, params: PagedParams, chip: TpuChip
) -> TpuPagedBlocks:
    """Chooses blocks by rule: keys enough to copy while others are computed, queries as
    many as their sums leave VMEM for."""
    K = operands.num_kv_heads
    width = round_up(operands.q.shape[2], LANES)
    width += 0 if operands.values is None else round_up(params.value_dim, LANES)
    longest = operands.page_tables.shape[1] * params.page_size

    def count_keys(most: int, most_bytes: int) -> int:
        keys = most_bytes // (K * width * operands.q.dtype.itemsize)
        keys = max(min(pl.next_power_of_2(keys + 1) // 2, most), _MIN_KEYS)
        return min(round_up(keys, params.page_size), longest)

    keys, uniform_keys = (
        count_keys(*most)
        for most in ((_CHUNK_KEYS, _CHUNK_BYTES), (_DECODE_KEYS, _DECODE_BYTES))
    )
    queries = min(_MAX_QUERIES, pl.next_power_of_2(len(operands.q)))
    queries = min(
        queries, pl.next_power_of_2(_QUERY_ROWS // operands.q.shape[1] + 1) // 2
    )
    room = chip.vmem_bytes * _USABLE
    while _vmem_bytes(operands, params, keys, max(queries, 1)) > room and queries > 1:
        if keys > 2 * uniform_keys or (
            queries <= 16 and keys % (2 * params.page_size) == 0
        ):
            keys //= 2
        else:
            queries //= 2
    return TpuPagedBlocks(max(queries, 1), keys, uniform_keys)


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    chip = get_chip()
    sizes = params.block_sizes or choose_blocks(operands, params, chip)
    whole = all(n % params.page_size == 0 for n in sizes[1:])
    if not whole or sizes.queries & (sizes.queries - 1):
        raise ValueError(f"{sizes} with pages of {params.page_size} tokens: whole "
                         f"pages, and a "
                         "power of two of queries")  # fmt: skip

    def attend(blocks: QueryBlocks, uniform: bool) -> tuple[jax.Array, jax.Array]:
        keys = sizes.uniform_keys if uniform else sizes.keys
        return _run(blocks, operands, params, keys, chip)

    # Half a tile of 16 bits would be repacked.
    tile = SUBLANES * 4 // operands.q.dtype.itemsize
    return attend_in_blocks(operands, params, sizes.queries, tile, attend)


def _run(
    blocks: QueryBlocks,
    operands: PagedOperands,
    params: PagedParams,
    keys: int,
    chip: TpuChip,
) -> tuple[jax.Array, jax.Array]:
    """Returns o [n, K, M, Hv] and lse [n, K, M] of blocks of queries."""
    n, K, M, H = blocks.q.shape
    cores = chip.num_cores
    Hv = params.value_dim
    bp = keys // params.page_size
    # Blocks with keys come first: each fetches the next one's first pages.
    places = blocks.places
    has_keys = places.end_page > places.first_page
    order = jnp.argsort(~has_keys, stable=True).astype(jnp.int32)
    count = has_keys.sum(dtype=jnp.int32)
    table = jnp.stack([order, *(x[order] for x in places)], axis=1)
    # Cores take turns; one beyond the blocks writes into one that nobody reads, and
    # looks ahead.
    padding = jnp.zeros((2 * cores, table.shape[1]), jnp.int32).at[:, 0].set(n)
    table = jnp.concatenate([table, padding])
    table = jnp.pad(table, ((0, 0), (0, COLUMNS - table.shape[1]))).reshape(-1)

    pages = operands.page_arrays
    buffers = [pltpu.VMEM((2, bp, *x.shape[1:]), x.dtype) for x in pages.values()]
    if not params.interpret:  # XLA would copy a pool that fits VMEM there, whole.
        pages = {
            n: pltpu.with_memory_space_constraint(x, pltpu.HBM)
            for n, x in pages.items()
        }
    learned = {
        name: jnp.broadcast_to(x[..., None], (K, M, LANES))
        for name, x in blocks.repeat_by_row(operands).items()
    }
    width = operands.page_tables.shape[1]
    statics = PagedKernelStatics(params, blocks.queries, cores, bp, width)
    chunks = -(-M // LANES)

    def item(i, c, table):
        return table[(i * cores + c) * COLUMNS]

    def at_item(c, i, table, *_):
        return item(i, c, table), 0, 0, 0

    needed = _vmem_bytes(operands, params, keys, blocks.queries)
    o, lse = pl.pallas_call(
        partial(attend_query_blocks, statics=statics),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, -(-jnp.maximum(count, 1) // cores)),
            in_specs=[
                pl.BlockSpec(
                    (None, K, M, H),
                    lambda c, i, table, *_: (
                        jnp.minimum(item(i, c, table), n - 1),
                        0,
                        0,
                        0,
                    ),
                ),
                dict.fromkeys(
                    learned, pl.BlockSpec((K, M, LANES), lambda *_: (0, 0, 0))
                ),
                dict.fromkeys(pages, pl.BlockSpec(memory_space=pltpu.HBM)),
            ],
            out_specs=[
                pl.BlockSpec((None, K, M, Hv), at_item),
                pl.BlockSpec((None, chunks, K, LANES), at_item),
            ],
            scratch_shapes=[
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(pages))),
                *(pltpu.VMEM((K, M, LANES), jnp.float32) for _ in range(2)),
                pltpu.VMEM((K, M, Hv), jnp.float32),
                *buffers,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((n + 1, K, M, Hv), params.dtype),
            jax.ShapeDtypeStruct((n + 1, chunks, K, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            # Of each copy: the table is in range, as the caller promised.
            disable_bounds_checks=True,
            vmem_limit_bytes=min(needed + needed // 8 + (4 << 20), chip.vmem_bytes),
        ),
        interpret=params.interpret,
        name="paged_attention",
    )(table, operands.page_tables.reshape(-1), count[None], blocks.q, learned, pages)
    return o[:n], lse[:n].transpose(0, 2, 1, 3).reshape(n, K, chunks * LANES)[:, :, :M]


def _vmem_bytes(
    operands: PagedOperands, params: PagedParams, keys: int, queries: int
) -> int:
    """Bytes of VMEM: pages of two blocks, queries and results twice, sums, scores of
    two heads."""
    (_, N, H), K = operands.q.shape, operands.num_kv_heads
    M = round_up(N // K * queries, SUBLANES)
    bp = keys // params.page_size
    needed = 0
    for x in jax.tree.leaves((operands.keys, operands.values)):
        *_, rows, lanes = x.shape
        heads = K if x.ndim == 4 else 1
        tile = 32 // x.dtype.itemsize
        one = heads * round_up(rows, tile) * round_up(lanes, LANES) * x.dtype.itemsize
        needed += 2 * bp * one
        if (
            x.dtype.itemsize == 1
        ):  # and as numbers, of which a few heads' are under way at once
            needed += 12 * heads * keys * round_up(lanes, LANES)
    H, Hv = round_up(H, LANES), round_up(params.value_dim, LANES)
    q, out = operands.q.dtype.itemsize, jnp.dtype(params.dtype).itemsize
    needed += K * M * (2 * (H * q + Hv * out) + 4 * (Hv + 2 * LANES))
    needed += 4 * 4 * min(M, 256) * keys
    learned = sum(x is not None for x in (operands.slopes, operands.sinks))
    return needed + 2 * learned * K * M * LANES * 4
