"""Linear maps, attention and log-probabilities whose sums have one order, whatever else
is computed with them.

A compiler chooses how to add up a product by its shape: a token's hidden state may then
differ in its last bits with the number of tokens beside it. Here each sum is in the body
of a loop that is the same for any number of tokens: products of tiles of
:data:`TILE_TOKENS` tokens, attention over one key after the other, from a sequence's
first to its last. So a token has the same bits in a training forward pass, a prompt's
chunk and a step of decoding, wherever it stands (He 2025, "Defeating nondeterminism in
LLM inference"). It costs time: tiles are small, and keys are not blocked.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from maxlm.parallel.decode_kernels import (
    DecodeKernels,
    PagedOperands,
    PagedParams,
)

TILE_TOKENS = 16
"""Tokens of a tile."""
_LOWEST = -1e30
"""Stands for a maximum over no scores; finite, so that differences are."""


def map_tiles(
    function: Callable[[tuple[jax.Array, ...]], jax.Array], *arrays: jax.Array
) -> jax.Array:
    """Applies a function of :data:`TILE_TOKENS` rows of arrays [R, ...] to all their
    rows; returns [R, ...]."""
    num_rows = len(arrays[0])
    # A loop of one turn the compiler would take apart, and merge with what stands
    # around it.
    num_tiles = max(2, -(-num_rows // TILE_TOKENS))
    num_padding = num_tiles * TILE_TOKENS - num_rows

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, num_padding), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(num_tiles, TILE_TOKENS, *x.shape[1:])

    y = lax.map(function, tuple(map(split, arrays)))
    return y.reshape(num_tiles * TILE_TOKENS, *y.shape[2:])[:num_rows]


def multiply_in_tiles(
    x: jax.Array,
    kernel: jax.Array,
    num_inputs: int,
    dtype: DTypeLike | None = None,
    *,
    column_major: bool = False,
) -> jax.Array:
    """Multiplies as :class:`~maxlm.parallel.decode_kernels.LocalProduct` says."""
    tokens = x.shape[: x.ndim - num_inputs]
    outputs = kernel.shape[num_inputs:]
    rows = x.reshape(prod(tokens), -1)
    columns = kernel.reshape(rows.shape[1], -1)

    def multiply(tile: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.dot(tile[0], columns, preferred_element_type=dtype)

    return map_tiles(multiply, rows).reshape(*tokens, *outputs)


def compute_log_probs_in_tiles(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes log softmax(logits)[target], fp32 [R], of logits fp32 [R, V]."""

    def compute(tile: tuple[jax.Array, ...]) -> jax.Array:
        logits, targets = tile
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        return chosen[:, 0] - total

    return map_tiles(compute, logits, targets)


class ScoreTerms(NamedTuple):
    """What attention's scores consist of beside q·k."""

    scale: float
    soft_cap: float | None
    slopes: jax.Array | None
    """fp32 [N]."""
    sinks: jax.Array | None
    """fp32 [N]."""


class KeyOfQueries(NamedTuple):
    """The t-th key of each query; leading axes are the queries' or broadcast to
    them."""

    key: jax.Array
    """[..., K, H]."""
    value: jax.Array
    """[..., K, Hv]."""
    is_seen: jax.Array
    """bool [...]."""
    distance: jax.Array
    """int32 [...]: tokens from the key to the query."""


def attend_in_order(
    q: jax.Array,
    read_key: Callable[[jax.Array], KeyOfQueries],
    num_keys: jax.Array | int,
    terms: ScoreTerms,
    *,
    num_kv_heads: int,
    value_dim: int,
) -> tuple[jax.Array, jax.Array]:
    """Attends to one key after the other. Keys that a query does not see change no bit
    of its sums.

    Args:
        q: [..., N, H].

    Returns:
        o [..., N, Hv] and the log-sum-exps [..., N] of scores, fp32.
    """
    *leading, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    by_group = (*leading, num_kv_heads, group)
    q = q.astype(jnp.float32).reshape(*by_group, head_dim)

    def spread(term: jax.Array) -> jax.Array:
        return term.astype(jnp.float32).reshape(num_kv_heads, group)

    def add_key(t: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, weighted = sums
        key, value, is_seen, distance = read_key(t)
        is_seen = is_seen[..., None, None]
        key = key.astype(jnp.float32)[..., None, :]
        value = value.astype(jnp.float32)[..., None, :]
        score = jnp.sum(q * key, axis=-1) * terms.scale
        if terms.soft_cap is not None:
            score = terms.soft_cap * jnp.tanh(score / terms.soft_cap)
        if terms.slopes is not None:
            distance = distance.astype(jnp.float32)[..., None, None]
            score = score - spread(terms.slopes) * distance
        new_top = jnp.maximum(top, jnp.where(is_seen, score, _LOWEST))
        decay = jnp.exp(top - new_top)
        weight = jnp.where(is_seen, jnp.exp(score - new_top), 0)
        total = total * decay + weight
        # What is not seen may be anything.
        value = jnp.where(is_seen[..., None], value, 0)
        weighted = weighted * decay[..., None] + weight[..., None] * value
        return new_top, total, weighted

    # From q, so that what shards have of their own is known to differ between them.
    zeros = jnp.zeros_like(q[..., 0])
    top = zeros + _LOWEST
    total = zeros
    if terms.sinks is not None:
        top = zeros + spread(terms.sinks)
        total = zeros + 1
    weighted = jnp.broadcast_to(zeros[..., None], (*by_group, value_dim))
    top, total, weighted = lax.fori_loop(0, num_keys, add_key, (top, total, weighted))
    o = weighted / jnp.where(total == 0, 1, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    return (
        o.reshape(*leading, num_heads, value_dim),
        lse.reshape(*leading, num_heads),
    )


def attend_rows_in_order(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    terms: ScoreTerms,
    *,
    segments: tuple[jax.Array, jax.Array] | None,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Attends causally in whole rows, as
    ``pallas_kernels.attention.attention_forward`` does: (o, lse)."""
    S = q.shape[1]
    places = jnp.arange(S, dtype=jnp.int32)[None]

    def read_key(t: jax.Array) -> KeyOfQueries:
        distance = places - t
        is_seen = distance >= 0
        if window is not None:
            is_seen &= distance < window
        if segments is not None:
            of_queries, of_keys = segments
            is_seen &= of_queries == lax.dynamic_slice_in_dim(of_keys, t, 1, axis=1)
        key = lax.dynamic_slice_in_dim(k, t, 1, axis=1)
        value = lax.dynamic_slice_in_dim(v, t, 1, axis=1)
        return KeyOfQueries(key, value, is_seen, distance)

    o, lse = attend_in_order(
        q, read_key, S, terms, num_kv_heads=k.shape[2], value_dim=v.shape[3]
    )
    return o.astype(v.dtype), lse


class OrderedPagedAttention:
    """Attention to pages: a :class:`~maxlm.parallel.decode_kernels.PagedKernel`."""

    def supports(self, operands: PagedOperands, params: PagedParams) -> bool:
        """Returns whether pages are arrays of keys and values, and no bias is
        learnt."""
        del params
        return (
            isinstance(operands.keys, jax.Array)
            and isinstance(operands.values, jax.Array)
            and operands.biases is None
        )

    def forward(
        self, operands: PagedOperands, params: PagedParams
    ) -> tuple[jax.Array, jax.Array]:
        """See :class:`~maxlm.parallel.decode_kernels.PagedKernel`."""
        q, keys, values = operands.q, operands.keys, operands.values
        assert isinstance(keys, jax.Array)
        assert isinstance(values, jax.Array)
        # Each query's row and position. Those of a row are its last tokens; behind the
        # last row's are none.
        starts = operands.query_starts
        num_rows = len(operands.kv_lengths)
        places = jnp.arange(len(q), dtype=jnp.int32)
        rows = jnp.searchsorted(starts, places, side="right").astype(jnp.int32) - 1
        is_query = rows < num_rows
        rows = jnp.minimum(rows, num_rows - 1)
        positions = operands.kv_lengths[rows] - starts[rows + 1] + places
        limits = jnp.minimum(operands.key_limits[rows], positions + 1)
        limits = jnp.where(is_query, limits, 0)
        firsts = params.find_first_key(positions)
        tables = operands.page_tables[rows]

        def read_key(t: jax.Array) -> KeyOfQueries:
            page = lax.dynamic_slice_in_dim(tables, t // params.page_size, 1, axis=1)
            page = page[:, 0]
            offset = t % params.page_size
            is_seen = (t >= firsts) & (t < limits)
            return KeyOfQueries(
                keys[page, :, offset], values[page, :, offset], is_seen, positions - t
            )

        terms = ScoreTerms(
            params.scale, params.soft_cap, operands.slopes, operands.sinks
        )
        o, lse = attend_in_order(
            q,
            read_key,
            jnp.max(limits),
            terms,
            num_kv_heads=keys.shape[1],
            value_dim=params.value_dim,
        )
        return o.astype(params.dtype), lse


BATCH_INVARIANT_KERNELS = DecodeKernels(multiply_in_tiles, OrderedPagedAttention())
"""What an engine's steps compute with to be batch-invariant."""
