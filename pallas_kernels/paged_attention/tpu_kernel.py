"""The TPU's kernel: blocks of queries of one row each, and their pages as they
arrive."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.attention.tpu_blocks import LANES
from pallas_kernels.attention.tpu_scores import LOG2_E, multiply
from pallas_kernels.kernel_types import Index, Ref
from pallas_kernels.paged_attention.params import PagedParams
from pallas_kernels.paged_attention.query_blocks import QueryBlock, is_in_chunk

COLUMNS = 8
"""Integers of a block of queries in the table: its index, and those of a
``QueryBlock``."""
# Scores that a mask has emptied: finite, so that no difference is NaN.
_MASKED = -1e30
# Above what is masked and below every score: the largest score where there is no key.
_NO_KEY = -0.5e30
# Rows of queries of a tile of scores, and of those tiles whose scores are computed
# ahead.
_TILE_ROWS = 128
_ROWS_AHEAD = 128


class PagedKernelStatics(NamedTuple):
    """The values that the kernel is compiled for."""

    params: PagedParams
    queries: int
    """Queries of a block, a power of two."""
    cores: int
    pages: int
    """Pages of a block of keys."""
    table_width: int
    """Pages of a row in the table."""


class PageCopies:
    """Copies of a block's pages from HBM into one of two buffers, ``slot`` 0 or 1.

    Args:
        tables: all rows' page tables, flat, in scalar memory.
        arrays: of pages, in HBM.
        buffers: for each of these one in VMEM, [2, pages of a block, ...].
        semaphores: [2, arrays].
        table_width: pages of a row in ``tables``.
    """

    def __init__(
        self,
        tables: Ref,
        arrays: list[Ref],
        buffers: list[Ref],
        semaphores: Ref,
        table_width: int,
    ):
        self.tables = tables
        self.arrays = arrays
        self.buffers = buffers
        self.semaphores = semaphores
        self.width = table_width
        self.pages = buffers[0].shape[1]

    def _count(self, block: QueryBlock, j: Index) -> jax.Array:
        """Pages of the j-th block of keys."""
        pages_left = block.end_page - block.first_page - j * self.pages
        return jnp.minimum(self.pages, pages_left)

    def start(self, block: QueryBlock, j: Index, slot: Index) -> None:
        """Starts to copy the j-th block of a block of queries' keys."""
        first = block.row * self.width + block.first_page + j * self.pages

        def start_page(i, _):
            page = self.tables[first + i]
            pairs = zip(self.arrays, self.buffers, strict=True)
            for n, (array, buffer) in enumerate(pairs):
                destination = buffer.at[slot, i]
                semaphore = self.semaphores.at[slot, n]
                pltpu.make_async_copy(array.at[page], destination, semaphore).start()

        lax.fori_loop(0, self._count(block, j), start_page, None)

    def wait(self, block: QueryBlock, j: Index, slot: Index) -> None:
        """Waits for what :meth:`start` has started. A semaphore counts bytes, so that a
        full block is waited for as one copy of the buffer's size."""
        count = self._count(block, j)

        @pl.when(count == self.pages)
        def wait_for_buffer():
            for n, buffer in enumerate(self.buffers):
                whole = buffer.at[slot]
                semaphore = self.semaphores.at[slot, n]
                pltpu.make_async_copy(whole, whole, semaphore).wait()

        @pl.when(count < self.pages)
        def wait_for_pages():
            def wait_page(i, _):
                pairs = zip(self.arrays, self.buffers, strict=True)
                for n, (array, buffer) in enumerate(pairs):
                    destination = buffer.at[slot, i]
                    semaphore = self.semaphores.at[slot, n]
                    pltpu.make_async_copy(array.at[0], destination, semaphore).wait()

            lax.fori_loop(0, count, wait_page, None)


def attend_query_blocks(
    table: Ref,
    tables: Ref,
    count: Ref,
    q_ref: Ref,
    head_terms: dict[str, Ref],
    pages: dict[str, Ref],
    o_ref: Ref,
    lse_ref: Ref,
    *scratch: Ref,
    statics: PagedKernelStatics,
) -> None:
    """One block of queries: all kv heads, over its pages.

    Args:
        table: the blocks of queries, flat, ``COLUMNS`` integers each.
        tables: the rows' page tables, flat.
        count: [1], blocks that see a key.
        q_ref: [K, M, H].
        head_terms: "slopes" and "sinks", where there are such, [K, M, LANES].
        pages: arrays in HBM by side ("k", "v") and part ("codes", "scale", "zero").
        o_ref: [K, M, Hv].
        lse_ref: [chunks of M, K, LANES].
        scratch: the slot that the next block of keys lies in, which lasts from one
            block of queries to the next; semaphores; each query's largest score, sum of
            weights and sum of values; a buffer for each of ``pages``.
    """
    slot_ref, semaphores, top_ref, sum_ref, acc_ref, *buffers = scratch
    core = pl.program_id(0)
    step = pl.program_id(1)
    item = step * statics.cores + core

    def read_block(ahead: int) -> QueryBlock:
        # The first column is the block's index, for the grid.
        return QueryBlock.read(table, item + ahead, COLUMNS, 1)

    # Cores take turns: this core's next block is as many further as there are cores.
    block = read_block(0)
    next_block = read_block(statics.cores)
    copies = PageCopies(
        tables, [*pages.values()], buffers, semaphores, statics.table_width
    )

    @pl.when(step == 0)
    def start_first_copies():
        slot_ref[0] = 0
        # What no page fills is multiplied by weights of 0.
        for buffer in buffers:
            buffer[...] = jnp.zeros_like(buffer)
        pl.when(block.end_page > block.first_page)(lambda: copies.start(block, 0, 0))

    # The softmax before the first key: that of the sink, or empty.
    acc_ref[...] = jnp.zeros_like(acc_ref)
    if "sinks" in head_terms:
        sinks = head_terms["sinks"][...]
        top_ref[...] = jnp.maximum(sinks * LOG2_E, _MASKED)
        # A sum is spread over the lanes: the sink's weight is in the first.
        is_first_lane = lax.broadcasted_iota(jnp.int32, sinks.shape, 2) == 0
        sum_ref[...] = jnp.where(is_first_lane & (sinks > _NO_KEY), 1.0, 0.0)
    else:
        top_ref[...] = jnp.full_like(top_ref, _NO_KEY)
        sum_ref[...] = jnp.zeros_like(sum_ref)
    num_blocks = pl.cdiv(block.end_page - block.first_page, statics.pages)
    buffer_by_name = dict(zip(pages, buffers, strict=True))

    def attend_block(j, _):
        # While block j of the keys is computed from its slot, the next one is copied
        # into the other: of these queries, or the first of the next block of queries.
        slot = slot_ref[0]
        pl.when(j + 1 < num_blocks)(lambda: copies.start(block, j + 1, 1 - slot))
        is_last = j + 1 == num_blocks
        has_next_block = item + statics.cores < count[0]
        pl.when(is_last & has_next_block)(lambda: copies.start(next_block, 0, 1 - slot))
        copies.wait(block, j, slot)

        first_page = block.first_page + j * statics.pages
        start = first_page * statics.params.page_size
        copied = {name: buffer.at[slot] for name, buffer in buffer_by_name.items()}
        state = _SoftmaxState(top_ref, sum_ref, acc_ref)
        _attend_pages(block, start, q_ref, copied, head_terms, state, statics)
        slot_ref[0] = 1 - slot

    lax.fori_loop(0, num_blocks, attend_block, None)

    # Results: zeros and −inf where there is neither key nor sink.
    total = jnp.sum(sum_ref[...], axis=2, keepdims=True)
    top = top_ref[...]
    has_weight = total > 0
    for head in range(len(acc_ref)):
        inverse = 1 / jnp.where(has_weight[head], total[head], 1.0)
        o_ref[head] = (acc_ref[head] * inverse).astype(o_ref.dtype)
    lse = top * (1 / LOG2_E) + jnp.log(jnp.where(has_weight, total, 1.0))
    _store_along_lanes(jnp.where(has_weight, lse, -jnp.inf), lse_ref)


class _SoftmaxState(NamedTuple):
    """Each query's softmax over the keys so far, fp32."""

    top: Ref
    """[K, M, LANES]: the largest score, alike along the lanes."""
    total: Ref
    """[K, M, LANES]: the sum of weights, whose lanes are still to be summed."""
    o: Ref
    """[K, M, Hv]: the sum of weighted values."""


def _attend_pages(
    block: QueryBlock,
    start: jax.Array,
    q_ref: Ref,
    pages: dict[str, Ref],
    head_terms: dict[str, Ref],
    state: _SoftmaxState,
    statics: PagedKernelStatics,
) -> None:
    """Adds a block of keys, the first at position ``start``, to the state."""
    params = statics.params
    K, M, _ = q_ref.shape
    B = statics.pages * params.page_size
    # Rows of a tile: all, where tiles of _TILE_ROWS do not divide them.
    rows = min(M, _TILE_ROWS)
    if M % rows:
        rows = M
    scales = _lane_scales(pages)
    tiles = [
        (head, slice(first, first + rows))
        for head in range(K)
        for first in range(0, M, rows)
    ]
    # What one stage of a tile leaves to the next: keys by head, the others by head and
    # first row.
    keys: dict[int, jax.Array] = {}
    scores: dict[tuple[int, int], jax.Array] = {}
    weights: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def score(head: int, tile: slice) -> None:
        if head not in keys:
            keys[head] = _read_keys(pages, head, B, q_ref.dtype)
        scores[head, tile.start] = multiply(q_ref[head, tile], keys[head], 1, 1)

    def weigh(head: int, tile: slice) -> None:
        x = scores.pop((head, tile.start))
        # Powers of two: the hardware's own exponential.
        if params.soft_cap is None:
            x *= params.scale * LOG2_E
        else:
            # cap · tanh(scale · q·k / cap).
            tanh = jnp.tanh(x * (params.scale / params.soft_cap))
            x = tanh * (params.soft_cap * LOG2_E)
        distance, seen = _compare_positions(block, start, tile.start, x.shape, statics)
        if "slopes" in head_terms:
            slopes = head_terms["slopes"][head, tile][:, :1] * LOG2_E
            x -= slopes * distance.astype(jnp.float32)
        x = jnp.where(seen, x, _MASKED)

        # Weights by the largest score so far; earlier sums were by an earlier one, and
        # decay.
        old_top = state.top[head, tile]
        top = jnp.maximum(old_top, jnp.max(x, axis=1, keepdims=True))
        decay = jnp.exp2(old_top - top)
        weight = jnp.exp2(x - top[:, :1])
        state.top[head, tile] = top
        old_total = state.total[head, tile]
        state.total[head, tile] = old_total * decay + _fold_lanes(weight)
        weights[head, tile.start] = weight, decay

    def add_values(head: int, tile: slice) -> None:
        weight, decay = weights.pop((head, tile.start))
        tile_o = _multiply_values(
            weight, keys[head], pages, scales, head, q_ref.dtype, params.value_dim
        )
        old_o = state.o[head, tile]
        state.o[head, tile] = old_o * decay[:, :1] + tile_o

    # Neighbours in the program overlap on the machine: while the vector unit weighs a
    # tile, the matrix unit scores one ahead and adds the values of one behind.
    ahead = max(1, _ROWS_AHEAD // rows)
    for n in range(-ahead, len(tiles) + ahead):
        if n + ahead < len(tiles):
            score(*tiles[n + ahead])
        if 0 <= n < len(tiles):
            weigh(*tiles[n])
        if n - ahead >= 0:
            add_values(*tiles[n - ahead])


def _compare_positions(
    block: QueryBlock,
    start: jax.Array,
    row: int,
    shape: tuple[int, ...],
    statics: PagedKernelStatics,
) -> tuple[jax.Array, jax.Array]:
    """Returns queries' positions less keys', and which keys are seen, of rows from
    ``row`` on."""
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = block.position - start - key
    seen = key < block.limit - start
    offset: jax.Array | int = 0
    if statics.queries > 1:
        query = lax.broadcasted_iota(jnp.int32, shape, 0) + row
        offset = query & (statics.queries - 1)
        distance += offset
        seen &= distance >= 0
    if statics.params.window is not None:
        seen &= distance < statics.params.window
    if statics.params.chunk is not None:
        seen &= is_in_chunk(distance, block.position, offset, statics.params.chunk)
    return distance, seen


def _read_codes(ref: Ref, head: int) -> jax.Array:
    """Reads a head's codes as fp32 [pages, page, H]."""
    x = ref[:, head]
    if x.dtype != jnp.uint8:
        return x.astype(jnp.float32)
    # Two codes a byte: the page's first half in the low bits, its second in the high.
    x = x.astype(jnp.int32)
    return jnp.concatenate([x & 15, x >> 4], axis=1).astype(jnp.float32)


def _read_keys(pages: dict[str, Ref], head: int, B: int, dtype: DTypeLike) -> jax.Array:
    """Reads a head's keys, [B, H]."""
    if "k_scale" not in pages:
        x = pages["k_codes"][:, head]
    else:
        # x = codes · scale + zero, of a channel over a page's tokens.
        x = _read_codes(pages["k_codes"], head)
        x *= pages["k_scale"][:, head].astype(jnp.float32)[:, None]
        if "k_zero" in pages:
            x += pages["k_zero"][:, head].astype(jnp.float32)[:, None]
        x = x.astype(dtype)
    return x.reshape(B, x.shape[-1])


def _lane_scales(pages: dict[str, Ref]) -> dict[str, jax.Array]:
    """Reads values' scales and zeros along the lanes, fp32 [K, B]."""
    scales = {}
    for name in ("v_scale", "v_zero"):
        if name in pages:
            ref = pages[name]  # [pages, K, page]
            parts = [ref[i].astype(jnp.float32) for i in range(ref.shape[0])]
            scales[name] = jnp.concatenate(parts, axis=1)
    return scales


def _multiply_values(
    weights: jax.Array,
    k: jax.Array,
    pages: dict[str, Ref],
    scales: dict[str, jax.Array],
    head: int,
    dtype: DTypeLike,
    Hv: int,
) -> jax.Array:
    """Multiplies weights fp32 [M, B] by a head's values: codes as they are, by weights
    that have the scale already."""
    if "v_codes" not in pages:
        # Values are the first features of the keys.
        return multiply(weights.astype(dtype), k[:, :Hv], 1, 0)
    if not scales:
        x = pages["v_codes"][:, head]
        return multiply(weights.astype(dtype), x.reshape(-1, Hv), 1, 0)
    codes = _read_codes(pages["v_codes"], head).astype(dtype)
    scaled = (weights * scales["v_scale"][head : head + 1]).astype(dtype)
    o = multiply(scaled, codes.reshape(-1, Hv), 1, 0)
    if "v_zero" in scales:
        zero = scales["v_zero"][head : head + 1]
        o += jnp.sum(weights * zero, axis=1, keepdims=True)
    return o


def _fold_lanes(x: jax.Array) -> jax.Array:
    """Sums [M, B] to [M, LANES], whose lanes are summed once, at the end."""
    M, B = x.shape
    if B % LANES:
        missing_lanes = jnp.zeros((M, -B % LANES), x.dtype)
        x = jnp.concatenate([x, missing_lanes], axis=1)
    starts = range(0, x.shape[1], LANES)
    parts = (x[:, start : start + LANES] for start in starts)
    return functools.reduce(jnp.add, parts)


def _store_along_lanes(x: jax.Array, ref: Ref) -> None:
    """Stores [K, M, LANES], alike along the lanes, as [chunks of M, K, LANES]."""
    M = x.shape[1]
    for chunk in range(ref.shape[0]):
        begin = chunk * LANES
        end = min(begin + LANES, M)
        rows = x[:, begin:end]
        # Row r's number goes to lane r: the diagonal is left, and summed over the rows.
        row = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        lane = lax.broadcasted_iota(jnp.int32, rows.shape, 2)
        diagonal = jnp.where(row == lane, rows, 0.0)
        ref[chunk] = jnp.sum(diagonal, axis=1)
