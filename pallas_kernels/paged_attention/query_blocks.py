"""Queries in blocks of one row each, as the kernels work on them, and their results
back in order.

A block's queries of one kv head are rows of a matrix: (query head of the group, query),
the query running faster, so that one mask serves all kv heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention.params import PagedOperands, PagedParams


class QueryBlock(NamedTuple):
    """The integers of a block: scalars in a kernel, int32 [n] of n blocks."""

    row: jax.Array
    position: jax.Array
    """Position of the first query; others follow, and fill up a block past the row's
    end."""
    limit: jax.Array
    """Keys at positions below are seen by some query; 0: none, or no block."""
    first_page: jax.Array
    """The first page of the row that a window lets a query see."""
    end_page: jax.Array
    """The page behind the last one; ``first_page`` where nothing is seen."""

    @classmethod
    def read(cls, table: Any, i: Any, columns: int, first: int = 0) -> "QueryBlock":
        """Reads, in a kernel, row i of a flat table: from its column ``first`` on."""
        return cls(*(table[i * columns + (first + n)] for n in range(len(cls._fields))))


class QueryBlocks(NamedTuple):
    """Blocks of E queries, n of them."""

    q: jax.Array
    """[n, K, M, H], M = group · E, filled up with zeros."""
    queries: int
    """E, a power of two."""
    places: QueryBlock
    tokens: jax.Array | None
    """int32 [T]: where each query is among n · E; None: they lie in order, ``kept`` a
    block."""
    kept: int
    """Queries of a block that are some."""

    def repeat_by_row(self, operands: PagedOperands) -> dict[str, jax.Array]:
        """Returns the slopes and sinks that are given, fp32 [K, M]: each row's query
        head's."""
        found = {}
        for name in ("sinks", "slopes"):
            x = getattr(operands, name)
            if x is not None:
                x = jnp.repeat(x.reshape(self.q.shape[1], -1), self.queries, axis=1)
                x = jnp.pad(x, ((0, 0), (0, self.q.shape[2] - x.shape[1])))
                found[name] = x.astype(jnp.float32)
        return found


def attend_in_blocks(
    operands: PagedOperands,
    params: PagedParams,
    queries: int,
    align: int,
    attend: Callable[[QueryBlocks, bool], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Returns o [T, N, Hv] and lse [T, N], by ``attend`` of (blocks, whether these are
    uniform rows), which gives o [n, K, M, Hv] and lse [n, K, M].

    Args:
        queries: of a block of the other rows; a power of two.
        align: M is a multiple.
    """
    parts = []
    if params.num_uniform:
        blocks = block_uniform_rows(operands, params, align)
        parts.append(restore_queries(blocks, *attend(blocks, True), operands, params))
    rest = len(operands.q) - params.num_uniform_queries
    if rest and params.num_uniform < len(operands.kv_lengths):
        blocks = block_ragged_rows(operands, params, queries, align)
        parts.append(restore_queries(blocks, *attend(blocks, False), operands, params))
    elif rest:
        shape = rest, operands.q.shape[1]
        zeros = jnp.zeros((*shape, params.value_dim), params.dtype)
        parts.append((zeros, jnp.full(shape, -jnp.inf)))
    o, lse = zip(*parts, strict=True)
    return jnp.concatenate(o), jnp.concatenate(lse)


def block_uniform_rows(
    operands: PagedOperands, params: PagedParams, align: int
) -> QueryBlocks:
    """Makes a block of each uniform row; M is a multiple of ``align``."""
    rows, each = params.num_uniform, params.queries_each
    q = operands.q[: rows * each].reshape(rows, each, *operands.q.shape[1:])
    E = pl.next_power_of_2(each)
    q = jnp.pad(q, ((0, 0), (0, E - each), (0, 0), (0, 0)))
    lengths, limits = operands.kv_lengths[:rows], operands.key_limits[:rows]
    pages = _page_range(lengths - each, lengths, limits, params)
    row = jnp.arange(rows, dtype=jnp.int32)
    places = QueryBlock(row, lengths - each, *pages)
    return QueryBlocks(_fold_heads(q, operands, align), E, places, None, each)


def block_ragged_rows(
    operands: PagedOperands, params: PagedParams, queries: int, align: int
) -> QueryBlocks:
    """Makes blocks of ``queries`` each, a power of two, of the other rows: as many as
    any lengths can need, the unused ones without a key."""
    q = operands.q[params.num_uniform_queries :]
    skipped = params.num_uniform
    lengths, limits = operands.kv_lengths[skipped:], operands.key_limits[skipped:]
    starts = operands.query_starts[skipped:] - params.num_uniform_queries
    counts = starts[1:] - starts[:-1]
    ends = jnp.cumsum(-(-counts // queries))
    begins = ends - -(-counts // queries)
    block = jnp.arange(len(q) // queries + len(counts), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, block, side="right"), len(counts) - 1)
    offset = (block - begins[row]) * queries
    used = block < ends[-1]
    position = jnp.where(used, lengths[row] - counts[row] + offset, 0)
    end = jnp.minimum(lengths[row], position + queries)
    pages = _page_range(position, end, jnp.where(used, limits[row], 0), params)
    inside = (starts[row] + offset)[:, None] + jnp.arange(queries, dtype=jnp.int32)
    blocked = q.at[inside].get(mode="clip")
    token = jnp.arange(len(q), dtype=jnp.int32)
    own = jnp.searchsorted(starts[1:], token, side="right").astype(jnp.int32)
    own = jnp.minimum(own, len(counts) - 1)
    tokens = begins[own] * queries + token - starts[own]
    tokens = jnp.where(token < starts[-1], tokens, -1)
    places = QueryBlock(row + skipped, position, *pages)
    return QueryBlocks(
        _fold_heads(blocked, operands, align), queries, places, tokens, queries
    )


def restore_queries(
    blocks: QueryBlocks,
    o: jax.Array,
    lse: jax.Array,
    operands: PagedOperands,
    params: PagedParams,
) -> tuple[jax.Array, jax.Array]:
    """Returns o [T, N, Hv] and lse [T, N] of blocks' o [n, K, M, Hv] and lse [n, K, M].
    What is there for blocks without a key may be anything."""
    n, K, _, Hv = o.shape
    N = operands.q.shape[1]
    group = N // K
    E = blocks.queries
    kept = blocks.kept
    places = blocks.places
    o = o[:, :, : group * E].reshape(n, K, group, E, Hv).transpose(0, 3, 1, 2, 4)
    lse = lse[:, :, : group * E].reshape(n, K, group, E).transpose(0, 3, 1, 2)
    has_keys = jnp.broadcast_to((places.end_page > places.first_page)[:, None], (n, E))
    # A row whose keys all lie elsewhere.
    has_queries = jnp.broadcast_to(
        (operands.kv_lengths[places.row] > 0)[:, None], (n, E)
    )
    o = o.reshape(n, E, N, Hv)
    lse = lse.reshape(n, E, N)
    if blocks.tokens is None:
        o, lse, has_keys, has_queries = (
            x[:, :kept].reshape(n * kept, *x.shape[2:])
            for x in (o, lse, has_keys, has_queries)
        )
    else:
        o, lse, has_keys, has_queries = (
            x.reshape(n * E, *x.shape[2:]).at[blocks.tokens].get(mode="clip")
            for x in (o, lse, has_keys, has_queries)
        )
        has_queries &= blocks.tokens >= 0
    none = jnp.full((N,), -jnp.inf) if operands.sinks is None else operands.sinks
    none = jnp.where(has_queries[:, None], none, -jnp.inf)
    has_keys = (has_keys & has_queries)[:, None]
    return jnp.where(has_keys[..., None], o, 0).astype(params.dtype), jnp.where(
        has_keys, lse, none
    )


def _fold_heads(q: jax.Array, operands: PagedOperands, align: int) -> jax.Array:
    """[n, E, N, H] → [n, K, M, H]"""
    (n, E, N, H), K = q.shape, operands.num_kv_heads
    q = (
        q.reshape(n, E, K, N // K, H)
        .transpose(0, 2, 3, 1, 4)
        .reshape(n, K, N // K * E, H)
    )
    return jnp.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % align), (0, 0)))


def _page_range(position, end, limits, params: PagedParams):
    """Returns ``limit``, ``first_page`` and ``end_page`` of blocks whose queries are at
    positions from ``position`` to ``end``."""
    limit = jnp.maximum(jnp.minimum(end, limits), 0)
    first = jnp.zeros_like(limit)
    if params.window is not None:
        first = jnp.maximum(position - params.window + 1, 0) // params.page_size
    pages = -(-limit // params.page_size)
    return limit, jnp.minimum(first, pages), pages
