"""Paged attention on a TPU: a kernel that walks over blocks of queries of one row each,
decoding rows or chunks of prefill, and over each one's own pages.

Pages stay in HBM; those of a block, which the prefetched tables name, are copied while
the block before is computed, the next row's first ones too. All kv heads are computed
from one copy.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_blocks import LANES, SUBLANES
from pallas_kernels.chips import TpuChip, get_chip, round_up
from pallas_kernels.paged_attention.params import PagedOperands, PagedParams
from pallas_kernels.paged_attention.query_blocks import (
    QueryBlocks,
    attend_in_blocks,
    is_chunk_long_enough,
)
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
# Share of VMEM for what `_vmem_bytes` counts.
_USABLE = 0.8
# Bytes of scalar memory, for tables.
_TABLE_BYTES = 1 << 19
# Tokens of a tile of memory, by dtype; a byte of uint8 has two.
_TILE_TOKENS = {"int8": 32, "uint8": 64, "bfloat16": 16, "float32": 8}


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
    q = operands.q
    tables = operands.page_tables
    for name, array in operands.page_arrays.items():
        if name.endswith("scale") and array.dtype not in (jnp.bfloat16, jnp.float32):
            return False
        if name.endswith("codes"):
            tile = _TILE_TOKENS.get(array.dtype.name)
            if tile is None or params.page_size % tile:
                return False
            if array.dtype.itemsize > 1 and array.dtype != q.dtype:
                return False
    queries = pl.next_power_of_2(max(params.queries_each, 1))
    uniform_fits = queries * q.shape[1] <= 2 * _QUERY_ROWS
    override = cast(TpuPagedBlocks | None, params.block_sizes)
    most_queries = override.queries if override else _MAX_QUERIES
    return (
        q.dtype in (jnp.bfloat16, jnp.float32)
        and operands.biases is None
        and tables.size * 4 <= _TABLE_BYTES
        and uniform_fits
        and is_chunk_long_enough(params, most_queries)
        and min(q.size, tables.size) > 0
    )


def choose_blocks(
    operands: PagedOperands, params: PagedParams, chip: TpuChip
) -> TpuPagedBlocks:
    """Chooses blocks by rule: keys enough to copy while others are computed, queries as
    many as their sums leave VMEM for."""
    K = operands.num_kv_heads
    # Features of a key and of its value, as they lie in VMEM.
    width = round_up(operands.q.shape[2], LANES)
    if operands.values is not None:
        width += round_up(params.value_dim, LANES)
    bytes_per_key = K * width * operands.q.dtype.itemsize
    longest = operands.page_tables.shape[1] * params.page_size

    def count_keys(most: int, most_bytes: int) -> int:
        # The largest power of two that fits, in bounds, and in whole pages.
        keys = most_bytes // bytes_per_key
        keys = pl.next_power_of_2(keys + 1) // 2
        keys = max(min(keys, most), _MIN_KEYS)
        return min(round_up(keys, params.page_size), longest)

    keys = count_keys(_CHUNK_KEYS, _CHUNK_BYTES)
    uniform_keys = count_keys(_DECODE_KEYS, _DECODE_BYTES)
    # The largest power of two whose rows are no more than _QUERY_ROWS.
    N = operands.q.shape[1]
    most_queries = pl.next_power_of_2(_QUERY_ROWS // N + 1) // 2
    all_queries = pl.next_power_of_2(len(operands.q))
    queries = min(_MAX_QUERIES, all_queries, most_queries)
    room = chip.vmem_bytes * _USABLE
    while _vmem_bytes(operands, params, keys, max(queries, 1)) > room and queries > 1:
        # Many queries read keys less often, so keys give way first; but few keys a
        # round wait for its sums more often.
        halves_are_pages = keys % (2 * params.page_size) == 0
        if keys > 2 * uniform_keys or (queries <= 16 and halves_are_pages):
            keys //= 2
        else:
            queries //= 2
    return TpuPagedBlocks(max(queries, 1), keys, uniform_keys)


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    chip = get_chip()
    override = cast(TpuPagedBlocks | None, params.block_sizes)
    sizes = override or choose_blocks(operands, params, chip)
    page = params.page_size
    whole_pages = sizes.keys % page == 0 and sizes.uniform_keys % page == 0
    is_power_of_two = sizes.queries & (sizes.queries - 1) == 0
    if not whole_pages or not is_power_of_two:
        raise ValueError(
            f"{sizes} with pages of {page} tokens: whole pages, and a power of two of "
            f"queries"
        )

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
    pages_per_block = keys // params.page_size
    # Blocks with keys come first: each fetches the next one's first pages.
    places = blocks.places
    has_keys = places.end_page > places.first_page
    order = jnp.argsort(~has_keys, stable=True).astype(jnp.int32)
    count = has_keys.sum(dtype=jnp.int32)
    # [n, COLUMNS less padding]: a block's index, and where its queries and keys are.
    ordered_places = [field[order] for field in places]
    table = jnp.stack([order, *ordered_places], axis=1)
    # Cores take turns; one beyond the blocks writes into one that nobody reads, and
    # looks ahead.
    padding = jnp.zeros((2 * cores, table.shape[1]), jnp.int32)
    padding = padding.at[:, 0].set(n)
    table = jnp.concatenate([table, padding])
    table = jnp.pad(table, ((0, 0), (0, COLUMNS - table.shape[1])))
    table = table.reshape(-1)

    pages = operands.page_arrays
    # Two of each: one is computed with while the other is copied into.
    buffers = [
        pltpu.VMEM((2, pages_per_block, *array.shape[1:]), array.dtype)
        for array in pages.values()
    ]
    if not params.interpret:
        # XLA would copy a pool that fits VMEM there, whole.
        pages = {
            name: pltpu.with_memory_space_constraint(array, pltpu.HBM)
            for name, array in pages.items()
        }
    head_terms = {
        name: jnp.broadcast_to(terms[..., None], (K, M, LANES))
        for name, terms in blocks.repeat_by_row(operands).items()
    }
    statics = PagedKernelStatics(
        params,
        queries=blocks.queries,
        cores=cores,
        pages=pages_per_block,
        table_width=operands.page_tables.shape[1],
    )
    # A result has one number a query: they lie along lanes, as many as there are.
    chunks = -(-M // LANES)

    # Index maps of a grid step: a core, its step, and the prefetched scalars.

    def block_index(core, step, table):
        return table[(step * cores + core) * COLUMNS]

    def at_result(core, step, table, *_):
        return block_index(core, step, table), 0, 0, 0

    def at_queries(core, step, table, *_):
        # Steps beyond the blocks read the last one's queries.
        return jnp.minimum(block_index(core, step, table), n - 1), 0, 0, 0

    def at_head_terms(*_):
        # The same for all blocks.
        return 0, 0, 0

    needed = _vmem_bytes(operands, params, keys, blocks.queries)
    # An eighth and 4 MiB more, for what is not counted.
    vmem_limit = min(needed + needed // 8 + (4 << 20), chip.vmem_bytes)
    head_term_spec = pl.BlockSpec((K, M, LANES), at_head_terms)
    # Pages stay in HBM: the kernel copies those of a block itself.
    pages_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    # One step at least, also where no block has a key.
    steps = -(-jnp.maximum(count, 1) // cores)
    o, lse = pl.pallas_call(
        partial(attend_query_blocks, statics=statics),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, steps),
            in_specs=[
                pl.BlockSpec((None, K, M, H), at_queries),
                dict.fromkeys(head_terms, head_term_spec),
                dict.fromkeys(pages, pages_spec),
            ],
            out_specs=[
                pl.BlockSpec((None, K, M, Hv), at_result),
                pl.BlockSpec((None, chunks, K, LANES), at_result),
            ],
            scratch_shapes=[
                # The slot in use; copies' semaphores; largest scores, sums of weights
                # and sums of values.
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(pages))),
                pltpu.VMEM((K, M, LANES), jnp.float32),
                pltpu.VMEM((K, M, LANES), jnp.float32),
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
            vmem_limit_bytes=vmem_limit,
        ),
        interpret=params.interpret,
        name="paged_attention",
    )(table, operands.page_tables.reshape(-1), count[None], blocks.q, head_terms, pages)
    o = o[:n]
    # [n, chunks, K, LANES] → [n, K, M].
    lse = lse[:n].transpose(0, 2, 1, 3)
    lse = lse.reshape(n, K, chunks * LANES)
    return o, lse[:, :, :M]


def _vmem_bytes(
    operands: PagedOperands, params: PagedParams, keys: int, queries: int
) -> int:
    """Bytes of VMEM: pages of two blocks, queries and results twice, sums, scores of
    two heads."""
    _, N, H = operands.q.shape
    K = operands.num_kv_heads
    M = round_up(N // K * queries, SUBLANES)
    pages_per_block = keys // params.page_size

    # Two buffers of each array of pages.
    needed = 0
    for array in jax.tree.leaves((operands.keys, operands.values)):
        *_, rows, lanes = array.shape
        itemsize = array.dtype.itemsize
        heads = K if array.ndim == 4 else 1
        # A tile has 32 bytes along the sublanes.
        padded_rows = round_up(rows, 32 // itemsize)
        padded_lanes = round_up(lanes, LANES)
        page_bytes = heads * padded_rows * padded_lanes * itemsize
        needed += 2 * pages_per_block * page_bytes
        if itemsize == 1:
            # And as numbers, of which a few heads' are under way at once.
            needed += 12 * heads * keys * padded_lanes

    # Blocks of queries and of results, two of each; largest scores, sums of weights and
    # sums of values, fp32.
    padded_H = round_up(H, LANES)
    padded_Hv = round_up(params.value_dim, LANES)
    query_bytes = padded_H * operands.q.dtype.itemsize
    result_bytes = padded_Hv * jnp.dtype(params.dtype).itemsize
    state_bytes = 4 * (padded_Hv + 2 * LANES)
    needed += K * M * (2 * (query_bytes + result_bytes) + state_bytes)

    # Scores and weights of two heads, fp32.
    needed += 4 * 4 * min(M, 256) * keys

    # Slopes and sinks along the lanes, fp32, two buffers of each.
    num_head_terms = sum(x is not None for x in (operands.slopes, operands.sinks))
    return needed + 2 * num_head_terms * K * M * LANES * 4
