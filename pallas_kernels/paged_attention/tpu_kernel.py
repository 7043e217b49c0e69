"""The TPU's kernel: blocks of queries of one row each, and their pages as they
arrive."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_blocks import LANES
from pallas_kernels.attention.tpu_scores import LOG2_E, multiply
from pallas_kernels.paged_attention.params import PagedParams
from pallas_kernels.paged_attention.query_blocks import QueryBlock

COLUMNS = 8
"""Integers of a block of queries in the table: its index, and those of a
``QueryBlock``."""
# Finite, so that no difference is NaN; and between the two what no score is.
_MASKED, _NO_KEY = -1e30, -0.5e30
# Rows of queries of a tile of scores, and of those tiles whose scores are computed
# ahead.
_TILE_ROWS = 128
_ROWS_AHEAD = 128


class PagedKernelStatics(NamedTuple):
    params: PagedParams
    queries: int
    """Queries of a block, a power of two."""
    cores: int
    pages: int
    """Pages of a block of keys."""
    table_width: int


class PageCopies:
    """Copies of a block's pages into one of two buffers."""

    def __init__(
        self, tables: Any, arrays: list, buffers: list, semaphores: Any, width: int
    ):
        self.tables, self.arrays, self.buffers = tables, arrays, buffers
        self.semaphores, self.width = semaphores, width
        self.pages = buffers[0].shape[1]

    def _count(self, block: QueryBlock, j: Any) -> Any:
        return jnp.minimum(
            self.pages, block.end_page - block.first_page - j * self.pages
        )

    def start(self, block: QueryBlock, j: Any, slot: Any) -> None:
        first = block.row * self.width + block.first_page + j * self.pages

        def start_page(i, _):
            page = self.tables[first + i]
            for n, (array, buffer) in enumerate(
                zip(self.arrays, self.buffers, strict=True)
            ):
                to, semaphore = buffer.at[slot, i], self.semaphores.at[slot, n]
                pltpu.make_async_copy(array.at[page], to, semaphore).start()

        lax.fori_loop(0, self._count(block, j), start_page, None)

    def wait(self, block: QueryBlock, j: Any, slot: Any) -> None:
        count = self._count(block, j)

        @pl.when(count == self.pages)
        def _():
            for n, buffer in enumerate(self.buffers):
                whole = buffer.at[slot]
                pltpu.make_async_copy(whole, whole, self.semaphores.at[slot, n]).wait()

        @pl.when(count < self.pages)
        def _():
            def wait_page(i, _):
                for n, (array, buffer) in enumerate(
                    zip(self.arrays, self.buffers, strict=True)
                ):
                    to, semaphore = buffer.at[slot, i], self.semaphores.at[slot, n]
                    pltpu.make_async_copy(array.at[0], to, semaphore).wait()

            lax.fori_loop(0, count, wait_page, None)


def attend_query_blocks(
    table, tables, count, q_ref, learned, pages, o_ref, lse_ref, *scratch, statics
) -> None:
    """One block of queries: all kv heads, over its pages. Arrays of ``pages`` have a
    side ("k", "v") and a part ("codes", "scale", "zero"); ``learned`` are the "slopes"
    and "sinks"."""
    slot_ref, semaphores, top_ref, sum_ref, acc_ref, *buffers = scratch
    core, step = pl.program_id(0), pl.program_id(1)
    item = step * statics.cores + core
    block, following = (
        QueryBlock.read(table, item + ahead, COLUMNS, 1) for ahead in (0, statics.cores)
    )
    copies = PageCopies(
        tables, [*pages.values()], buffers, semaphores, statics.table_width
    )

    @pl.when(step == 0)
    def _():
        slot_ref[0] = 0
        # What no page fills is multiplied by weights of 0.
        for buffer in buffers:
            buffer[...] = jnp.zeros_like(buffer)
        pl.when(block.end_page > block.first_page)(lambda: copies.start(block, 0, 0))

    acc_ref[...] = jnp.zeros_like(acc_ref)
    if "sinks" in learned:
        sinks = learned["sinks"][...]
        top_ref[...] = jnp.maximum(sinks * LOG2_E, _MASKED)
        first = lax.broadcasted_iota(jnp.int32, sinks.shape, 2) == 0
        sum_ref[...] = jnp.where(first & (sinks > _NO_KEY), 1.0, 0.0)
    else:
        top_ref[...] = jnp.full_like(top_ref, _NO_KEY)
        sum_ref[...] = jnp.zeros_like(sum_ref)
    num_blocks = pl.cdiv(block.end_page - block.first_page, statics.pages)
    named = dict(zip(pages, buffers, strict=True))

    def attend_block(j, _):
        slot = slot_ref[0]
        pl.when(j + 1 < num_blocks)(lambda: copies.start(block, j + 1, 1 - slot))
        last = (j + 1 == num_blocks) & (item + statics.cores < count[0])
        pl.when(last)(lambda: copies.start(following, 0, 1 - slot))
        copies.wait(block, j, slot)
        start = (block.first_page + j * statics.pages) * statics.params.page_size
        own = {name: buffer.at[slot] for name, buffer in named.items()}
        _attend_pages(
            block, start, q_ref, own, learned, (top_ref, sum_ref, acc_ref), statics
        )
        slot_ref[0] = 1 - slot

    lax.fori_loop(0, num_blocks, attend_block, None)
    total = jnp.sum(sum_ref[...], axis=2, keepdims=True)
    top = top_ref[...]
    some = total > 0
    for head in range(len(acc_ref)):
        inverse = 1 / jnp.where(some[head], total[head], 1.0)
        o_ref[head] = (acc_ref[head] * inverse).astype(o_ref.dtype)
    lse = jnp.where(
        some, top * (1 / LOG2_E) + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf
    )
    _store_along_lanes(lse, lse_ref)


def _attend_pages(
    block, start, q_ref, pages, learned, state, statics: PagedKernelStatics
) -> None:
    """Adds a block of keys, the first at position ``start``, to the state."""
    top_ref, sum_ref, acc_ref = state
    params, (K, M, _) = statics.params, q_ref.shape
    B = statics.pages * params.page_size
    rows = min(M, _TILE_ROWS)
    rows = rows if M % rows == 0 else M
    scales = _lane_scales(pages)
    keys = {}
    in_flight = {}
    tiles = [
        (head, slice(at, at + rows)) for head in range(K) for at in range(0, M, rows)
    ]

    def score(tile):
        head, here = tile
        if head not in keys:
            keys[head] = _read_keys(pages, head, B, q_ref.dtype)
        in_flight[head, here.start] = multiply(q_ref[head, here], keys[head], 1, 1)

    def weigh(tile):
        head, here = tile
        x = in_flight.pop((head, here.start))
        if params.soft_cap is None:
            x *= params.scale * LOG2_E
        else:
            x = jnp.tanh(x * (params.scale / params.soft_cap)) * (
                params.soft_cap * LOG2_E
            )
        distance, seen = _compare_positions(block, start, here.start, x.shape, statics)
        if "slopes" in learned:
            slopes = learned["slopes"][head, here][:, :1] * LOG2_E
            x -= slopes * distance.astype(jnp.float32)
        x = jnp.where(seen, x, _MASKED)
        old = top_ref[head, here]
        top = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        decay = jnp.exp2(old - top)
        x = jnp.exp2(x - top[:, :1])
        top_ref[head, here] = top
        sum_ref[head, here] = sum_ref[head, here] * decay + _fold_lanes(x)
        in_flight[head, here.start] = x, decay

    def add_values(tile):
        head, here = tile
        x, decay = in_flight.pop((head, here.start))
        own = _multiply_values(
            x, keys[head], pages, scales, head, q_ref.dtype, params.value_dim
        )
        acc_ref[head, here] = acc_ref[head, here] * decay[:, :1] + own

    # Neighbours in the program overlap on the machine.
    ahead = max(1, _ROWS_AHEAD // rows)
    for n in range(-ahead, len(tiles) + ahead):
        for stage, at in ((score, n + ahead), (weigh, n), (add_values, n - ahead)):
            if 0 <= at < len(tiles):
                stage(tiles[at])


def _compare_positions(
    block: QueryBlock,
    start: Any,
    row: int,
    shape: tuple[int, ...],
    statics: PagedKernelStatics,
) -> tuple[jax.Array, jax.Array]:
    """Returns queries' positions less keys', and which keys are seen, of rows from
    ``row`` on."""
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = block.position - start - key
    seen = key < block.limit - start
    if statics.queries > 1:
        query = lax.broadcasted_iota(jnp.int32, shape, 0) + row
        distance += query & (statics.queries - 1)
        seen &= distance >= 0
    if statics.params.window is not None:
        seen &= distance < statics.params.window
    return distance, seen


def _read_codes(ref: Any, head: int) -> jax.Array:
    """Reads a head's codes as fp32 [pages, page, H]."""
    x = ref[:, head]
    if x.dtype != jnp.uint8:
        return x.astype(jnp.float32)
    x = x.astype(jnp.int32)
    return jnp.concatenate([x & 15, x >> 4], axis=1).astype(jnp.float32)


def _read_keys(pages: dict[str, Any], head: int, B: int, dtype: Any) -> jax.Array:
    """Reads a head's keys, [B, H]."""
    if "k_scale" not in pages:
        x = pages["k_codes"][:, head]
    else:
        x = _read_codes(pages["k_codes"], head)
        x *= pages["k_scale"][:, head].astype(jnp.float32)[:, None]
        if "k_zero" in pages:
            x += pages["k_zero"][:, head].astype(jnp.float32)[:, None]
        x = x.astype(dtype)
    return x.reshape(B, x.shape[-1])


def _lane_scales(pages: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads values' scales and zeros along the lanes, fp32 [K, B]."""
    return {
        name: jnp.concatenate(
            [pages[name][i].astype(jnp.float32) for i in range(pages[name].shape[0])],
            axis=1,
        )
        for name in ("v_scale", "v_zero")
        if name in pages
    }


def _multiply_values(
    weights, k, pages, scales, head: int, dtype: Any, Hv: int
) -> jax.Array:
    """Multiplies weights fp32 [M, B] by a head's values: codes as they are, by weights
    that have the scale already."""
    if "v_codes" not in pages:
        return multiply(weights.astype(dtype), k[:, :Hv], 1, 0)
    if not scales:
        x = pages["v_codes"][:, head]
        return multiply(weights.astype(dtype), x.reshape(-1, Hv), 1, 0)
    x = _read_codes(pages["v_codes"], head).astype(dtype)
    own = (weights * scales["v_scale"][head : head + 1]).astype(dtype)
    own = multiply(own, x.reshape(-1, Hv), 1, 0)
    if "v_zero" in scales:
        own += jnp.sum(
            weights * scales["v_zero"][head : head + 1], axis=1, keepdims=True
        )
    return own


def _fold_lanes(x: jax.Array) -> jax.Array:
    """Sums [M, B] to [M, LANES], whose lanes are summed once, at the end."""
    M, B = x.shape
    if B % LANES:
        x = jnp.concatenate([x, jnp.zeros((M, -B % LANES), x.dtype)], axis=1)
    return functools.reduce(
        jnp.add, (x[:, at : at + LANES] for at in range(0, x.shape[1], LANES))
    )


def _store_along_lanes(x: jax.Array, ref: Any) -> None:
    """Stores [K, M, LANES], alike along the lanes, as [chunks of M, K, LANES]."""
    M = x.shape[1]
    for chunk in range(ref.shape[0]):
        rows = x[:, chunk * LANES : min((chunk + 1) * LANES, M)]
        row = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        lane = lax.broadcasted_iota(jnp.int32, rows.shape, 2)
        ref[chunk] = jnp.sum(jnp.where(row == lane, rows, 0.0), axis=1)
