"""Keys and values in int8 or int4, the last ones as they are (KIVI, Liu et al. 2024,
arXiv 2402.02750).

A row's last tokens lie in a ring of pages of its own, in the compute dtype. A page is
quantized when all its tokens are older than the recent ones, so that how much of a
sequence is quantized is a function of its length alone, and tokens can be taken back. A
query attends to the quantized pages and to the others by two calls of one kernel; their
log-sum-exps join them.

Shapes: D shards of the batch, R rows of a shard, n pages in a row's ring, P pages, K kv
heads, H head dim. A row whose tokens fill pages 0 to i has pages 0 to i − (n − 2)
quantized, and the last n − 2 full ones and the one that is being filled in its ring.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.models.caches.layout import CacheArraySpec, as_array
from maxlm.models.caches.paged import AttentionCache, pad_features
from maxlm.models.caches.ragged import RaggedBatch
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import AxisRules
from pallas_kernels.attention.combine import merge_attention
from pallas_kernels.paged_attention import QuantizedPages, paged_attention, write_pages

SCALE_DTYPE = jnp.bfloat16

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedCache(AttentionCache):
    """Pages of integers, and each row's last tokens."""

    key: QuantizedPages
    """Of [D, P, K, page, H]."""
    value: QuantizedPages | None
    """None: a token's value is the beginning of its key."""
    recent_key: jax.Array
    """[D, R, n, K, page, H]: page i of a row's sequence, not quantized yet, is in place
    i mod n."""
    recent_value: jax.Array | None
    copies_heads = True

    def attend_shard(
        self,
        q: jax.Array,
        key: jax.Array | None,
        value: jax.Array | None,
        batch: RaggedBatch,
        terms: AttentionTerms,
        *,
        rules: AxisRules,
        value_dim: int | None,
    ) -> tuple[jax.Array, Self]:
        """See :class:`AttentionCache`. All is written before anything is read: or XLA
        copies whole pools. Raises MaxlmError: more than a page of tokens of a row that
        decodes."""
        assert key is not None
        num_uniform, tokens_per_row = batch.uniform_rows
        num_uniform_tokens = num_uniform * tokens_per_row
        _, ring_pages, _, page_size, padded_size = self.recent_key.shape
        if tokens_per_row > page_size:
            raise MaxlmError(
                f"{tokens_per_row} tokens a step of a row that decodes, in pages of "
                f"{page_size}",
                where="cache",
                fix="guess fewer tokens, or raise page_size",
            )
        attend = partial(
            paged_attention,
            value_dim=value_dim,
            window=terms.window,
            scale=terms.scale,
            soft_cap=terms.soft_cap,
            slopes=terms.slopes,
            biases=terms.biases,
            dtype=jnp.promote_types(q.dtype, jnp.float32),
            kernel=batch.attention_kernel,
        )
        lengths = batch.kv_lengths
        starts = batch.query_starts
        slots, page_tables = batch.pages(terms.window)

        def count_quantized_pages(num_tokens: jax.Array) -> jax.Array:
            full_pages = num_tokens // page_size
            recent_full_pages = ring_pages - 2
            return jnp.maximum(full_pages - recent_full_pages, 0)

        # Pages of each row that were quantized before this step, and after it.
        first = count_quantized_pages(lengths - jnp.diff(starts))
        last = count_quantized_pages(lengths)

        # Keys, and values where they have their own, as lists of one or two.
        new = _list_arrays(key, value)
        rings = _list_arrays(self.recent_key, self.recent_value)
        pools = _list_arrays(self.key, self.value)
        feature_sizes = [array.shape[-1] for array in new]
        new = [
            pad_features(array, ring.shape[-1])
            for array, ring in zip(new, rings, strict=True)
        ]
        q = pad_features(q, padded_size)
        num_slots = len(self.key.scale) * page_size
        live = slots < num_slots

        # Write: uniform rows, then chunks. What each does not quantize is attended to
        # by a call of its own, after all writes.
        recent_calls: list[Callable[[], tuple[jax.Array, jax.Array]]] = []

        def write_tokens(
            write: _WriteExact,
            rows: slice,
            tokens: slice,
            row_starts: jax.Array,
            uniform_rows: tuple[int, int],
        ) -> None:
            """Writes the tokens of some rows; the call that attends to what of them is
            not quantized follows when all is written."""
            nonlocal rings, pools
            positions = batch.positions[tokens]
            is_live = live[tokens]
            bounds = (first[rows], last[rows])
            if not len(positions):
                return
            rings, exact = write(
                rings,
                [array[tokens] for array in new],
                positions,
                is_live,
                batch,
                bounds,
            )
            pools = _write_quantized(
                pools, exact, page_tables[rows], bounds, feature_sizes
            )
            call = partial(
                attend,
                q[tokens],
                *_make_pair(exact.pages),
                exact.tables,
                # Tokens of each row that are not quantized.
                lengths[rows] - bounds[0] * page_size,
                row_starts,
                uniform_rows=uniform_rows,
            )
            recent_calls.append(call)

        uniform_starts = starts[: num_uniform + 1]
        chunk_starts = starts[num_uniform:] - num_uniform_tokens
        write_tokens(
            _write_uniform_rows,
            slice(num_uniform),
            slice(num_uniform_tokens),
            uniform_starts,
            (num_uniform, tokens_per_row),
        )
        write_tokens(
            _write_chunks,
            slice(num_uniform, None),
            slice(num_uniform_tokens, None),
            chunk_starts,
            (0, 0),
        )

        # Read: the quantized pages of all rows, and the tokens behind them.
        quantized_output = attend(
            q,
            *_make_pair(pools),
            page_tables,
            lengths,
            starts,
            sinks=terms.sinks,  # once: the two outputs are joined
            uniform_rows=(num_uniform, tokens_per_row),
            key_limits=first * page_size,
        )
        recent_output, *chunk_output = [call() for call in recent_calls]
        if chunk_output:
            recent_output = jax.tree.map(
                lambda *parts: jnp.concatenate(parts), recent_output, *chunk_output
            )
        y, _ = merge_attention(quantized_output, recent_output)
        if value is not None:
            y = y[..., : value.shape[-1]]
        key_pages, value_pages = _make_pair(pools)
        key_ring, value_ring = _make_pair(rings)
        cache = replace(
            self,
            key=key_pages,
            value=value_pages,
            recent_key=key_ring,
            recent_value=value_ring,
        )
        return y.astype(q.dtype), cache


def quantized_pages_spec(
    pages: CacheArraySpec, kind: Literal["int8", "int4"], *, per_channel: bool = False
) -> QuantizedPages:
    """Returns a :class:`CacheArraySpec` for each array of quantized pages.

    Args:
        pages: [D, P, K, page, H].
        per_channel: as keys; else per token, as values.
    """
    *leading, page_size, head_size = pages.shape
    num_scales = head_size if per_channel else page_size
    scale = replace(
        pages,
        shape=(*leading, num_scales),
        axes=pages.axes[:-1],
        dtype=SCALE_DTYPE,
    )
    if kind == "int8":
        codes = replace(pages, dtype=jnp.int8)
        return QuantizedPages(as_array(codes), as_array(scale), None)
    if page_size % 2:
        raise MaxlmError(
            f"page_size={page_size} is odd, and int4 keeps two tokens in a byte",
            where="cache",
            fix="use an even number",
        )
    packed_shape = (*leading, page_size // 2, head_size)
    codes = replace(pages, shape=packed_shape, dtype=jnp.uint8)
    zero_point = scale
    return QuantizedPages(as_array(codes), as_array(scale), as_array(zero_point))


def count_ring_pages(recent: int, page_size: int) -> int:
    """Returns the pages of a row's ring: the recent ones, one that is being filled
    behind them, and one more, so that all tokens of a step find room."""
    recent_pages = -(-recent // page_size)  # rounded up
    return recent_pages + 2


def quantize_pages(
    pages: jax.Array, dtype: DTypeLike, *, per_channel: bool
) -> QuantizedPages:
    """Rounds [..., page, H] to integers, scales first to bf16, so that codes belong to
    them.

    Args:
        dtype: int8, symmetric from -127 to 127, or uint8 for pairs of 0 to 15 with a
            zero point.
        per_channel: a scale for each channel, as of keys; else for each token.
    """
    is_int8 = dtype == jnp.int8
    x = pages.astype(jnp.float32)
    # The axis that shares a scale: tokens of a page, or a token's channels.
    axis = -2 if per_channel else -1
    top = x.max(axis, keepdims=True)
    bottom = x.min(axis, keepdims=True)
    zero_point = None
    if is_int8:
        lowest_code = -127
        highest_code = 127
        span = jnp.maximum(top, -bottom)
    else:
        lowest_code = 0
        highest_code = 15
        zero_point = bottom.astype(SCALE_DTYPE)
        x = x - zero_point
        span = top - zero_point
    # A span of 0 would divide by 0.
    scale = (jnp.maximum(span, 1e-30) / highest_code).astype(SCALE_DTYPE)
    codes = jnp.round(x / scale.astype(jnp.float32))
    codes = jnp.clip(codes, lowest_code, highest_code).astype(dtype)
    if not is_int8:
        # A byte has a token of the page's first half and one of its second.
        low_bits, high_bits = jnp.split(codes, 2, axis=-2)
        codes = low_bits | high_bits << 4
    scale = scale.squeeze(axis)
    if zero_point is not None:
        zero_point = zero_point.squeeze(axis)
    return QuantizedPages(codes, scale, zero_point)


class _ExactTokens(NamedTuple):
    """The tokens of some rows that are not quantized, and the pages that become so."""

    pages: list[jax.Array]
    """Keys [P', K, page, H], and values if there are any."""
    tables: jax.Array
    """int32 [n, M']: of each row's tokens from its first page that was not quantized
    on."""
    ripe: jax.Array
    """int32 [n, m]: the pages that may become quantized now, in order."""


_PageBounds = tuple[jax.Array, jax.Array]
"""int32 [n] each: pages of each row that are quantized before a step, and after it."""
_WriteExact = Callable[
    [
        list[jax.Array],
        list[jax.Array],
        jax.Array,
        jax.Array,
        RaggedBatch,
        _PageBounds,
    ],
    tuple[list[jax.Array], _ExactTokens],
]
"""(rings, new tokens, their positions, whether they are live, batch, bounds) -> (rings,
tokens that are not quantized)."""


def _write_uniform_rows(
    rings: list[jax.Array],
    new: list[jax.Array],
    positions: jax.Array,
    live: jax.Array,
    batch: RaggedBatch,
    bounds: _PageBounds,
) -> tuple[list[jax.Array], _ExactTokens]:
    """Writes tokens of uniform rows into their rings [R, n, K, page, H], and reads them
    there."""
    num_uniform, tokens_per_row = batch.uniform_rows
    ring_pages, _, page_size = rings[0].shape[1:4]
    first, _ = bounds
    # Rings side by side are one pool of pages: a row's begin at its ring's start, and
    # page i of its sequence is in place i mod n.
    ring_starts = jnp.arange(num_uniform)[:, None] * ring_pages
    positions = positions.reshape(num_uniform, tokens_per_row)
    page = ring_starts + positions // page_size % ring_pages
    slots = (page * page_size + positions % page_size).reshape(-1)
    slots = jnp.where(live, slots, rings[0].size)  # past the end: dropped
    pages = [
        write_pages(ring.reshape(-1, *ring.shape[2:]), tokens, slots)
        for ring, tokens in zip(rings, new, strict=True)
    ]
    tables = ring_starts + (first[:, None] + jnp.arange(ring_pages)) % ring_pages
    rings = [
        written.reshape(ring.shape) for written, ring in zip(pages, rings, strict=True)
    ]
    # A step of at most a page completes at most one page.
    return rings, _ExactTokens(pages, tables, ripe=tables[:, :1])


def _write_chunks(
    rings: list[jax.Array],
    new: list[jax.Array],
    positions: jax.Array,
    live: jax.Array,
    batch: RaggedBatch,
    bounds: _PageBounds,
) -> tuple[list[jax.Array], _ExactTokens]:
    """Puts chunks' tokens behind the recent ones of their rows, and the last of them in
    rings."""
    ring_pages, _, page_size = rings[0].shape[1:4]
    num_tokens = len(positions)
    first, last = bounds
    chunk_rows = batch.chunk_rows
    num_chunks = len(chunk_rows)
    chunk_starts = batch.query_starts[-num_chunks - 1 :]
    chunk_starts = chunk_starts - batch.query_starts[-num_chunks - 1]

    # Each chunk has a run of pages: those of its row's ring that are not quantized, and
    # room for all tokens of the step.
    recent_pages = ring_pages - 1
    new_pages = -(-num_tokens // page_size)  # rounded up
    pages_per_chunk = recent_pages + new_pages
    ring_places = (first[:, None] + jnp.arange(recent_pages)) % ring_pages
    room = (0, new_pages)
    padding = (0, 0), room, *((0, 0),) * 3
    pages = [jnp.pad(ring[chunk_rows[:, None], ring_places], padding) for ring in rings]
    pages = [array.reshape(-1, *array.shape[2:]) for array in pages]

    # A chunk's run begins with page `first` of its row's sequence.
    token = jnp.arange(num_tokens)
    chunk = jnp.searchsorted(chunk_starts, token, side="right") - 1
    chunk = jnp.minimum(chunk, num_chunks - 1)
    slots = (chunk * pages_per_chunk - first[chunk]) * page_size + positions
    slots = jnp.where(live, slots, pages[0].size)  # past the end: dropped
    pages = [
        write_pages(array, tokens, slots)
        for array, tokens in zip(pages, new, strict=True)
    ]
    tables = jnp.arange(num_chunks * pages_per_chunk).reshape(-1, pages_per_chunk)

    # The page of the sequence that each place of a ring has now, then where it lies
    # among `pages`.
    sequence_page = (
        last[:, None] + (jnp.arange(ring_pages) - last[:, None]) % ring_pages
    )
    run_page = jnp.minimum(sequence_page - first[:, None], pages_per_chunk - 1)
    source = run_page + tables[:, :1]
    # Rows of empty chunks keep their rings: past the end, and dropped.
    has_tokens = chunk_starts[1:] > chunk_starts[:-1]
    written_rows = jnp.where(has_tokens, chunk_rows, len(rings[0]))
    rings = [
        ring.at[written_rows].set(array[source], mode="drop")
        for ring, array in zip(rings, pages, strict=True)
    ]
    return rings, _ExactTokens(pages, tables, ripe=tables)


def _write_quantized(
    pools: list[QuantizedPages],
    exact: _ExactTokens,
    page_tables: jax.Array,
    bounds: _PageBounds,
    feature_sizes: list[int],
) -> list[QuantizedPages]:
    """Quantizes the pages of each row between its bounds, and the first of their
    features, as many as arrays have of their own."""
    first, last = bounds
    # Pages of each row's sequence [n, m], and their places in the pools.
    page = first[:, None] + jnp.arange(exact.ripe.shape[1])
    last_entry = page_tables.shape[1] - 1
    places = jnp.take_along_axis(page_tables, jnp.minimum(page, last_entry), axis=1)
    num_pages = len(pools[0].scale)
    places = jnp.where(page < last[:, None], places, num_pages)  # past: dropped
    places = places.reshape(-1)
    ripe = exact.ripe.reshape(-1)

    def write_to_pool(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[places].set(pad_features(new, pool.shape[-1]), mode="drop")

    written = []
    for index, (pool, pages) in enumerate(zip(pools, exact.pages, strict=True)):
        features = pages[ripe][..., : feature_sizes[index]]
        is_key = index == 0
        new = quantize_pages(features, pool.codes.dtype, per_channel=is_key)
        written.append(jax.tree.map(write_to_pool, pool, new))
    return written


def _list_arrays(key: T, value: T | None) -> list[T]:
    return [key] if value is None else [key, value]


def _make_pair(arrays: list[T]) -> tuple[T, T | None]:
    """Returns keys, and values or None."""
    return arrays[0], arrays[1] if len(arrays) > 1 else None
