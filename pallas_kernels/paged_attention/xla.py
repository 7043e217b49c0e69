"""Paged attention in a form that any XLA backend compiles: an online softmax (Milakov &
Gimelshein 2018) over blocks of pages, each gathered where it is used, from the first that a query
sees to the last. No more than a block is ever copied.

Uniform rows go through their blocks together. Other rows' queries go a block of one row
after the other. All loops end where the batch ends, not where arrays do.

Letters: R rows, E queries of a row, T queries of the batch, M pages of a row, P pages in
all, N query heads, K kv heads, H features of a query and a key, Hv of a value.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.paged_attention.params import (
    PagedOperands,
    PagedParams,
    Pages,
    QuantizedPages,
    accumulation_dtype,
    dequantize,
)

# Queries of one row, and keys, in a block.
_QUERIES = 32
_KEYS = 64


class XlaBlockSizes(NamedTuple):
    queries: int
    """Queries of one row that are attended to at once."""
    keys: int
    """Keys of a block, in whole pages."""


def _get_blocks(params: PagedParams) -> XlaBlockSizes:
    """Returns the call's block sizes, or those by default."""
    override = cast(XlaBlockSizes | None, params.block_sizes)
    return override or XlaBlockSizes(_QUERIES, _KEYS)


class _Rows(NamedTuple):
    """Rows with the same number of queries."""

    q: jax.Array
    """[R, E, N, H]."""
    positions: jax.Array
    """int32 [R, E]; −1: no query."""
    limits: jax.Array
    """int32 [R]: the keys are those at positions below."""
    tables: jax.Array
    """int32 [R, M]."""


def forward(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """See :func:`~pallas_kernels.paged_attention.paged_attention`."""
    parts = []
    if params.num_uniform:
        parts.append(_attend_uniform(operands, params))
    if len(operands.q) > params.num_uniform_queries:
        parts.append(_attend_ragged(operands, params))
    o, lse = zip(*parts, strict=True)
    return jnp.concatenate(o), jnp.concatenate(lse)


def _attend_uniform(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse of the uniform rows' queries, all rows at once."""
    R = params.num_uniform
    E = params.queries_each
    _, N, H = operands.q.shape
    q = operands.q[: R * E].reshape(R, E, N, H)
    # A row's queries are its last E tokens.
    first_positions = operands.kv_lengths[:R, None] - E
    positions = first_positions + jnp.arange(E, dtype=jnp.int32)
    rows = _Rows(q, positions, operands.key_limits[:R], operands.page_tables[:R])
    o, lse = _attend_rows(rows, operands, params)
    o = o.reshape(R * E, N, params.value_dim)
    lse = lse.reshape(R * E, N)
    return o, lse


def _attend_ragged(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse of the other rows' queries, a block of one row after the
    other."""
    q = operands.q[params.num_uniform_queries :]
    T, N, _ = q.shape
    size = min(_get_blocks(params).queries, T)
    # Room for a last block that is not full.
    o = jnp.zeros((T + size, N, params.value_dim), params.dtype)
    lse = jnp.full((T + size, N), -jnp.inf, accumulation_dtype(q))
    first_row = params.num_uniform
    if first_row == len(operands.kv_lengths):
        # All rows are uniform: these queries are padding.
        return o[:T], lse[:T]

    # The rows that are not uniform, and how many blocks of queries each one has.
    lengths = operands.kv_lengths[first_row:]
    limits = operands.key_limits[first_row:]
    tables = operands.page_tables[first_row:]
    starts = operands.query_starts[first_row:]
    starts = starts - params.num_uniform_queries
    counts = starts[1:] - starts[:-1]
    num_blocks = -(-counts // size)
    # Row r's blocks are those before ends[r] that no earlier row has.
    ends = jnp.cumsum(num_blocks)
    q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))

    def attend_queries(block, out):
        o, lse = out
        row = jnp.searchsorted(ends, block, side="right")
        # The block's first query, counted from its row's first.
        first = (block - ends[row] + num_blocks[row]) * size
        # The same query, counted from the first of all rows.
        begin = starts[row] + first
        offsets = jnp.arange(size, dtype=jnp.int32)
        inside = offsets < counts[row] - first
        block_q = lax.dynamic_slice_in_dim(q, begin, size)[None]
        # A row's queries are its last tokens.
        positions = lengths[row] - counts[row] + first + offsets
        positions = jnp.where(inside, positions, -1)[None]
        rows = _Rows(block_q, positions, limits[row][None], tables[row][None])
        block_o, block_lse = _attend_rows(rows, operands, params)
        # What it writes behind its row the next row's blocks write over.
        o = lax.dynamic_update_slice_in_dim(o, block_o[0], begin, 0)
        lse = lax.dynamic_update_slice_in_dim(lse, block_lse[0], begin, 0)
        return o, lse

    o, lse = lax.fori_loop(0, ends[-1], attend_queries, (o, lse))
    return o[:T], lse[:T]


def _attend_rows(
    rows: _Rows, operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """Returns o [R, E, N, Hv] and lse [R, E, N]."""
    R, E, N, H = rows.q.shape
    K = operands.num_kv_heads
    group = N // K
    wide = accumulation_dtype(rows.q)
    limits = rows.limits
    positions = rows.positions

    # A block of keys is whole pages; rows' tables are padded to whole blocks.
    most_pages = max(1, _get_blocks(params).keys // params.page_size)
    num_pages = min(most_pages, rows.tables.shape[1])
    block = num_pages * params.page_size
    missing_pages = -rows.tables.shape[1] % num_pages
    tables = jnp.pad(rows.tables, ((0, 0), (0, missing_pages)))

    # One matrix of queries a kv head: (query head of the group, query).
    q = rows.q.reshape(R, E, K, group, H)
    q = q.transpose(0, 2, 3, 1, 4)  # [R, K, group, E, H]
    q = q.reshape(R, K, group * E, H)

    # The loop goes from the first block that some query of some row sees to the last.
    is_query = rows.positions >= 0
    ends = jnp.minimum(limits, positions.max(axis=1) + 1)
    end_block = -(-ends.max() // block)
    first_block = jnp.zeros((), jnp.int32)
    if params.window is not None or params.chunk is not None:
        no_query = jnp.iinfo(jnp.int32).max
        lowest_query = jnp.where(is_query, positions, no_query).min()
        first_block = params.find_first_key(lowest_query) // block

    def attend_keys(j, carry):
        """Adds block j of the keys to the online softmax: the sum of weighted values,
        the largest score and the sum of weights so far, [R, K, group, E, Hv or 1]."""
        o, top, total = carry

        # [R, K, block, H] and [R, K, block, Hv].
        pages = lax.dynamic_slice_in_dim(tables, j * num_pages, num_pages, 1)
        k = _read_pages(operands.keys, pages, per_channel=True, dtype=rows.q.dtype)
        v = k[..., : params.value_dim]
        if operands.values is not None:
            v = _read_pages(
                operands.values, pages, per_channel=False, dtype=rows.q.dtype
            )

        # Scores [R, K, group, E, block], −inf where a query does not see a key.
        scores = jnp.einsum("rkmh,rkth->rkmt", q, k, preferred_element_type=wide)
        keys = j * block + jnp.arange(block, dtype=jnp.int32)
        distance = positions[..., None] - keys  # [R, E, block]
        scores = scores.reshape(R, K, group, E, block) * params.scale
        scores = _adjust_scores(scores, distance, operands, params)
        seen = (distance >= 0) & (keys < limits[:, None, None])
        if params.window is not None:
            seen &= distance < params.window
        if params.chunk is not None:
            seen &= distance <= (positions % params.chunk)[..., None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)

        # Weights by the largest score so far; earlier sums were by an earlier one, and
        # decay.
        block_top = scores.max(axis=-1, keepdims=True)
        new_top = jnp.maximum(top, block_top)
        # No key yet: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - base)
        decay = jnp.exp(top - base)

        folded_weights = weights.reshape(R, K, group * E, block).astype(v.dtype)
        block_o = jnp.einsum(
            "rkmt,rkth->rkmh", folded_weights, v, preferred_element_type=wide
        )
        o = o * decay + block_o.reshape(o.shape)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        return o, new_top, total

    # The state before the first block.
    shape = R, K, group, E, 1
    top = jnp.full(shape, -jnp.inf, wide)
    total = jnp.zeros(shape, wide)
    if operands.sinks is not None:
        # As if a key with the sink's score had come first, and a value of zeros.
        sinks = operands.sinks.reshape(1, K, group, 1, 1)
        has_query = is_query[:, None, None, :, None]
        top = jnp.where(has_query, sinks, top)
        total = jnp.broadcast_to(has_query & (sinks > -jnp.inf), shape)
        total = total.astype(wide)
    o = jnp.zeros((*shape[:-1], params.value_dim), wide)
    state = o, top, total
    o, top, total = lax.fori_loop(first_block, end_block, attend_keys, state)

    # Queries that have seen neither a key nor a sink give zeros and −inf.
    o = o / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)[..., 0]
    # Heads back in their order: [R, K, group, E, ...] → [R, E, N, ...].
    o = o.transpose(0, 3, 1, 2, 4)
    o = o.reshape(R, E, N, params.value_dim)
    o = o.astype(params.dtype)
    lse = lse.transpose(0, 3, 1, 2)
    return o, lse.reshape(R, E, N)


def _adjust_scores(
    scores: jax.Array, distance: jax.Array, operands: PagedOperands, params: PagedParams
) -> jax.Array:
    """Caps scores [R, K, group, E, B], and adds what depends on distance [R, E, B]."""
    K, group = scores.shape[1:3]
    if params.soft_cap is not None:
        scores = params.soft_cap * jnp.tanh(scores / params.soft_cap)
    if operands.slopes is not None:
        slopes = operands.slopes.reshape(K, group, 1, 1)
        scores -= slopes * distance[:, None, None].astype(scores.dtype)
    if operands.biases is not None:
        # biases[n, reach] is that of distance 0.
        reach = operands.biases.shape[1] // 2
        index = jnp.clip(-distance, -reach, reach) + reach
        biases = operands.biases[:, index]  # [N, R, E, B]
        biases = biases.reshape(K, group, *distance.shape)
        scores += biases.transpose(2, 0, 1, 3, 4)
    return scores


def _read_pages(
    pages: Pages, table: jax.Array, *, per_channel: bool, dtype: DTypeLike
) -> jax.Array:
    """Reads [R, K, block, H] of pages int32 [R, n]."""
    if isinstance(pages, QuantizedPages):
        gathered = jax.tree.map(lambda array: _gather(array, table), pages)
        wide = jnp.promote_types(dtype, jnp.float32)
        x = dequantize(gathered, per_channel=per_channel, dtype=wide).astype(dtype)
    else:
        x = _gather(pages, table)
    R, K, *_, H = x.shape
    return x.reshape(R, K, -1, H)


def _gather(x: jax.Array, table: jax.Array) -> jax.Array:
    """Gathers [R, K, n, ...] of x [P, K, ...], a head of a page as one row of a table:
    what XLA copies fastest on a CPU, with indices that it has computed before."""
    P, K, *page_shape = x.shape
    first_rows = table[:, None] * K  # [R, 1, n]: of the page's first head
    heads = jnp.arange(K, dtype=jnp.int32)
    rows = first_rows + heads[:, None]  # [R, K, n]
    # Without the barrier XLA computes the index anew for each number that it copies.
    rows = lax.optimization_barrier(rows.reshape(-1))
    flat = x.reshape(P * K, -1)
    pages = flat.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return pages.reshape(len(table), K, -1, *page_shape)
