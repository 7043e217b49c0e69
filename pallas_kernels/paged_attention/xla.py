"""Paged attention in a form that any XLA backend compiles: an online softmax (Milakov &
Gimelshein 2018) over blocks of pages, each gathered where it is used, from the first that a query
sees to the last. No more than a block is ever copied.

Uniform rows go through their blocks together. Other rows' queries go a block of one row
after the other. All loops end where the batch ends, not where arrays do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
    q = operands.q[: R * E].reshape(R, E, *operands.q.shape[1:])
    first_positions = operands.kv_lengths[:R, None] - E
    positions = first_positions + jnp.arange(E, dtype=jnp.int32)
    rows = _Rows(q, positions, operands.key_limits[:R], operands.page_tables[:R])
    o, lse = _attend_rows(rows, operands, params)
    return o.reshape(R * E, *o.shape[2:]), lse.reshape(R * E, -1)


def _attend_ragged(
    operands: PagedOperands, params: PagedParams
) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse of the other rows' queries, a block of one row after the
    other."""
    q = operands.q[params.num_uniform_queries :]
    T, N, _ = q.shape
    max_queries = params.block_sizes.queries if params.block_sizes else _QUERIES
    size = min(max_queries, T)
    # Room for a last block that is not full.
    o = jnp.zeros((T + size, N, params.value_dim), params.dtype)
    lse = jnp.full((T + size, N), -jnp.inf, accumulation_dtype(q))
    if params.num_uniform < len(operands.kv_lengths):
        lengths = operands.kv_lengths[params.num_uniform :]
        limits = operands.key_limits[params.num_uniform :]
        tables = operands.page_tables[params.num_uniform :]
        starts = operands.query_starts[params.num_uniform :]
        starts = starts - params.num_uniform_queries
        counts = starts[1:] - starts[:-1]
        num_blocks = -(-counts // size)
        ends = jnp.cumsum(num_blocks)
        q = jnp.pad(q, ((0, size), (0, 0), (0, 0)))

        def attend_queries(block, out):
            row = jnp.searchsorted(ends, block, side="right")
            # The block's first query, counted from its row's first.
            first = (block - ends[row] + num_blocks[row]) * size
            begin = starts[row] + first
            offsets = jnp.arange(size, dtype=jnp.int32)
            inside = offsets < counts[row] - first
            block_q = lax.dynamic_slice_in_dim(q, begin, size)[None]
            positions = lengths[row] - counts[row] + first + offsets
            positions = jnp.where(inside, positions, -1)[None]
            rows = _Rows(block_q, positions, limits[row][None], tables[row][None])
            results = _attend_rows(rows, operands, params)
            # What it writes behind its row the next row's blocks write over.
            return tuple(
                lax.dynamic_update_slice_in_dim(array, result[0], begin, 0)
                for array, result in zip(out, results, strict=True)
            )

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

    num_keys = params.block_sizes.keys if params.block_sizes else _KEYS
    num_pages = min(max(1, num_keys // params.page_size), rows.tables.shape[1])
    block = num_pages * params.page_size
    missing_pages = -rows.tables.shape[1] % num_pages
    tables = jnp.pad(rows.tables, ((0, 0), (0, missing_pages)))

    # One matrix of queries a kv head: (query head of the group, query).
    q = rows.q.reshape(R, E, K, group, H)
    q = q.transpose(0, 2, 3, 1, 4)
    q = q.reshape(R, K, group * E, H)

    # The loop goes from the first block that some query of some row sees to the last.
    is_query = rows.positions >= 0
    ends = jnp.minimum(limits, positions.max(axis=1) + 1)
    last = -(-ends.max() // block)
    first = jnp.zeros((), jnp.int32)
    if params.window is not None:
        lowest = jnp.where(is_query, positions, jnp.iinfo(jnp.int32).max).min()
        first = jnp.maximum(lowest - params.window + 1, 0) // block

    def attend_keys(j, carry):
        o, top, total = carry
        pages = lax.dynamic_slice_in_dim(tables, j * num_pages, num_pages, 1)
        k = _read_pages(operands.keys, pages, per_channel=True, dtype=rows.q.dtype)
        v = k[..., : params.value_dim]
        if operands.values is not None:
            v = _read_pages(
                operands.values, pages, per_channel=False, dtype=rows.q.dtype
            )
        scores = jnp.einsum("rkmh,rkth->rkmt", q, k, preferred_element_type=wide)
        keys = j * block + jnp.arange(block, dtype=jnp.int32)
        distance = positions[..., None] - keys
        scores = scores.reshape(R, K, group, E, block) * params.scale
        scores = _adjust_scores(scores, distance, operands, params)
        seen = (distance >= 0) & (keys < limits[:, None, None])
        if params.window is not None:
            seen &= distance < params.window
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        # No key yet: −inf − −inf is NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - base)
        decay = jnp.exp(top - base)
        block_o = jnp.einsum(
            "rkmt,rkth->rkmh",
            weights.reshape(R, K, group * E, block).astype(v.dtype),
            v,
            preferred_element_type=wide,
        )
        o = o * decay + block_o.reshape(o.shape)
        total = total * decay + weights.sum(axis=-1, keepdims=True)
        return o, new_top, total

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
    o, top, total = lax.fori_loop(first, last, attend_keys, (o, top, total))
    o = o / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)[..., 0]
    o = o.transpose(0, 3, 1, 2, 4)
    o = o.reshape(R, E, N, params.value_dim)
    return o.astype(params.dtype), lse.transpose(0, 3, 1, 2).reshape(R, E, N)


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
        reach = operands.biases.shape[1] // 2
        index = jnp.clip(-distance, -reach, reach) + reach
        biases = operands.biases[:, index]
        biases = biases.reshape(K, group, *distance.shape)
        scores += biases.transpose(2, 0, 1, 3, 4)
    return scores


def _read_pages(
    pages: Pages, table: jax.Array, *, per_channel: bool, dtype: Any
) -> jax.Array:
    """Reads [R, K, block, H] of pages int32 [R, n]."""
    if isinstance(pages, QuantizedPages):
        gathered = jax.tree.map(lambda array: _gather(array, table), pages)
        wide = jnp.promote_types(dtype, jnp.float32)
        x = dequantize(gathered, per_channel=per_channel, dtype=wide).astype(dtype)
    else:
        x = _gather(pages, table)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _gather(x: jax.Array, table: jax.Array) -> jax.Array:
    """Gathers [R, K, n, ...] of x [P, K, ...], a head of a page as one row of a table:
    what XLA copies fastest on a CPU, with indices that it has computed before."""
    P, K, *page_shape = x.shape
    rows = table[:, None] * K + jnp.arange(K, dtype=jnp.int32)[:, None]
    # Without the barrier XLA computes the index anew for each number that it copies.
    rows = lax.optimization_barrier(rows.reshape(-1))
    flat = x.reshape(P * K, -1)
    pages = flat.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return pages.reshape(len(table), K, -1, *page_shape)
