"""Queries in blocks of one row each, as the kernels work on them, and their results
back in order.

A block's queries of one kv head are rows of a matrix: (query head of the group, query),
the query running faster, so that one mask serves all kv heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.kernel_types import Ref
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
    """The first page of the row that a window or a chunk lets a query see."""
    end_page: jax.Array
    """The page behind the last one; ``first_page`` where nothing is seen."""

    @classmethod
    def read(
        cls, table: Ref, i: jax.Array, columns: int, first: int = 0
    ) -> "QueryBlock":
        """Reads, in a kernel, row i of a flat table: from its column ``first`` on."""
        num_fields = len(cls._fields)
        fields = [table[i * columns + (first + n)] for n in range(num_fields)]
        return cls(*fields)


class QueryBlocks(NamedTuple):
    """Blocks of E queries, n of them."""

    q: jax.Array
    """[n, K, M, H], M = group · E, filled up with zeros."""
    queries: int
    """E, a power of two."""
    places: QueryBlock
    tokens: jax.Array | None
    """int32 [T]: where each query is among n · E; None: they lie in order,
    ``num_queries`` a block."""
    num_queries: int
    """Queries of a full block; the others, up to E, are padding."""

    def repeat_by_row(self, operands: PagedOperands) -> dict[str, jax.Array]:
        """Returns the slopes and sinks that are given, fp32 [K, M]: each row's query
        head's."""
        _, K, M, _ = self.q.shape
        repeated = {}
        for name, terms in (("sinks", operands.sinks), ("slopes", operands.slopes)):
            if terms is None:
                continue
            by_kv_head = terms.reshape(K, -1)  # [K, group]
            rows = jnp.repeat(by_kv_head, self.queries, axis=1)
            missing_rows = M - rows.shape[1]
            rows = jnp.pad(rows, ((0, 0), (0, missing_rows)))
            repeated[name] = rows.astype(jnp.float32)
        return repeated


def is_chunk_long_enough(params: PagedParams, queries: int) -> bool:
    """Returns whether blocks of ``queries`` of one row, and uniform rows, cross the end
    of one chunk at most, as :func:`is_in_chunk` needs it."""
    most_queries = max(queries, pl.next_power_of_2(max(params.queries_each, 1)))
    return params.chunk is None or params.chunk >= most_queries


def is_in_chunk(
    distance: jax.Array, position: jax.Array, offset: jax.Array | int, chunk: int
) -> jax.Array:
    """Returns, in a kernel, whether keys before queries are in the same chunk as these.

    Args:
        distance: int32, queries' positions less keys'.
        position: int32 scalar, of a block's first query.
        offset: int32, as many positions behind it as each query is.
    """
    # One division a block, of a scalar: vector units have none.
    place = lax.rem(position, chunk) + offset
    place = jnp.where(place < chunk, place, place - chunk)
    return distance <= place


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
        o, lse = attend(blocks, True)
        parts.append(restore_queries(blocks, o, lse, operands, params))
    num_ragged = len(operands.q) - params.num_uniform_queries
    if num_ragged and params.num_uniform < len(operands.kv_lengths):
        blocks = block_ragged_rows(operands, params, queries, align)
        o, lse = attend(blocks, False)
        parts.append(restore_queries(blocks, o, lse, operands, params))
    elif num_ragged:
        # Queries of no row: padding behind uniform rows.
        N = operands.q.shape[1]
        zeros = jnp.zeros((num_ragged, N, params.value_dim), params.dtype)
        no_weight = jnp.full((num_ragged, N), -jnp.inf)
        parts.append((zeros, no_weight))
    o, lse = zip(*parts, strict=True)
    return jnp.concatenate(o), jnp.concatenate(lse)


def block_uniform_rows(
    operands: PagedOperands, params: PagedParams, align: int
) -> QueryBlocks:
    """Makes a block of each uniform row; M is a multiple of ``align``."""
    rows = params.num_uniform
    num_queries = params.queries_each
    _, N, H = operands.q.shape
    q = operands.q[: rows * num_queries]
    q = q.reshape(rows, num_queries, N, H)
    # A power of two, so that a kernel finds a row's query by a bitwise and.
    E = pl.next_power_of_2(num_queries)
    q = jnp.pad(q, ((0, 0), (0, E - num_queries), (0, 0), (0, 0)))
    lengths = operands.kv_lengths[:rows]
    limits = operands.key_limits[:rows]
    # A row's queries are its last tokens.
    pages = _page_range(lengths - num_queries, lengths, limits, params)
    row = jnp.arange(rows, dtype=jnp.int32)
    places = QueryBlock(row, lengths - num_queries, *pages)
    folded = _fold_heads(q, operands, align)
    return QueryBlocks(folded, E, places, tokens=None, num_queries=num_queries)


def block_ragged_rows(
    operands: PagedOperands, params: PagedParams, queries: int, align: int
) -> QueryBlocks:
    """Makes blocks of ``queries`` each, a power of two, of the other rows: as many as
    any lengths can need, the unused ones without a key."""
    q = operands.q[params.num_uniform_queries :]
    num_uniform = params.num_uniform
    lengths = operands.kv_lengths[num_uniform:]
    limits = operands.key_limits[num_uniform:]
    starts = operands.query_starts[num_uniform:] - params.num_uniform_queries
    counts = starts[1:] - starts[:-1]

    # Row r's blocks are begins[r] to ends[r].
    ends = jnp.cumsum(-(-counts // queries))
    begins = ends - -(-counts // queries)

    # Each block's row, the place of its first query in that row, and its keys.
    # Each row rounds its own queries up: at most one block more than all would need.
    max_blocks = len(q) // queries + len(counts)
    block = jnp.arange(max_blocks, dtype=jnp.int32)
    row = jnp.searchsorted(ends, block, side="right")
    # Unused blocks are the last row's.
    row = jnp.minimum(row, len(counts) - 1)
    offset = (block - begins[row]) * queries
    used = block < ends[-1]
    position = jnp.where(used, lengths[row] - counts[row] + offset, 0)
    end = jnp.minimum(lengths[row], position + queries)
    block_limits = jnp.where(used, limits[row], 0)
    pages = _page_range(position, end, block_limits, params)

    # A block that is not full has the next row's queries too: nobody reads their
    # results.
    first_token = (starts[row] + offset)[:, None]
    block_tokens = first_token + jnp.arange(queries, dtype=jnp.int32)
    blocked = q.at[block_tokens].get(mode="clip")  # [n, E, N, H]

    # The way back: where each query's result stands.
    token = jnp.arange(len(q), dtype=jnp.int32)
    token_row = jnp.searchsorted(starts[1:], token, side="right").astype(jnp.int32)
    token_row = jnp.minimum(token_row, len(counts) - 1)
    tokens = begins[token_row] * queries + token - starts[token_row]
    tokens = jnp.where(token < starts[-1], tokens, -1)

    places = QueryBlock(row + num_uniform, position, *pages)
    folded = _fold_heads(blocked, operands, align)
    return QueryBlocks(folded, queries, places, tokens, num_queries=queries)


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
    places = blocks.places

    # Rows of matrices back to heads: [n, K, M, ...] → [n, E, N, ...].
    o = o[:, :, : group * E]
    o = o.reshape(n, K, group, E, Hv)
    o = o.transpose(0, 3, 1, 2, 4)
    lse = lse[:, :, : group * E]
    lse = lse.reshape(n, K, group, E)
    lse = lse.transpose(0, 3, 1, 2)

    sees_pages = places.end_page > places.first_page
    has_keys = jnp.broadcast_to(sees_pages[:, None], (n, E))
    # Without keys and yet with queries is a row whose keys all lie elsewhere.
    is_row = operands.kv_lengths[places.row] > 0
    has_queries = jnp.broadcast_to(is_row[:, None], (n, E))
    o = o.reshape(n, E, N, Hv)
    lse = lse.reshape(n, E, N)

    def restore(x: jax.Array) -> jax.Array:
        """[n, E, ...] → [T, ...]"""
        if blocks.tokens is None:
            count = blocks.num_queries
            return x[:, :count].reshape(n * count, *x.shape[2:])
        flat = x.reshape(n * E, *x.shape[2:])
        return flat.at[blocks.tokens].get(mode="clip")

    o = restore(o)
    lse = restore(lse)
    has_keys = restore(has_keys)
    has_queries = restore(has_queries)

    # What a query that has seen no key gets: its sink, and zeros.
    if blocks.tokens is not None:
        has_queries &= blocks.tokens >= 0
    if operands.sinks is None:
        no_keys_lse = jnp.full((N,), -jnp.inf)
    else:
        no_keys_lse = operands.sinks
    no_keys_lse = jnp.where(has_queries[:, None], no_keys_lse, -jnp.inf)
    has_keys = (has_keys & has_queries)[:, None]
    o = jnp.where(has_keys[..., None], o, 0)
    o = o.astype(params.dtype)
    lse = jnp.where(has_keys, lse, no_keys_lse)
    return o, lse


def _fold_heads(q: jax.Array, operands: PagedOperands, align: int) -> jax.Array:
    """[n, E, N, H] → [n, K, M, H]"""
    n, E, N, H = q.shape
    K = operands.num_kv_heads
    group = N // K
    q = q.reshape(n, E, K, group, H)
    q = q.transpose(0, 2, 3, 1, 4)  # [n, K, group, E, H]
    q = q.reshape(n, K, group * E, H)
    missing_rows = -(group * E) % align
    return jnp.pad(q, ((0, 0), (0, 0), (0, missing_rows), (0, 0)))


def _page_range(
    position: jax.Array, end: jax.Array, limits: jax.Array, params: PagedParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``limit``, ``first_page`` and ``end_page`` of blocks whose queries are at
    positions from ``position`` to ``end``."""
    limit = jnp.maximum(jnp.minimum(end, limits), 0)
    # An empty row's position is below 0.
    first = params.find_first_key(jnp.maximum(position, 0)) // params.page_size
    end_page = -(-limit // params.page_size)
    # A window may begin behind the last key.
    first_page = jnp.minimum(first, end_page)
    return limit, first_page, end_page
