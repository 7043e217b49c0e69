"""Keys and values in int8 or int4, the last ones as they are (KIVI, Liu et al. 2024,
arXiv 2402.02750).

A row's last tokens lie in a ring of pages of its own, in the compute dtype. A page is
quantized when all its tokens are older than the recent ones, so that how much of a
sequence is quantized is a function of its length alone, and tokens can be taken back. A
query attends to the quantized pages and to the others by two calls of one kernel; their
log-sum-exps join them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import MaxlmError
from maxlm.models.caches.layout import CacheArraySpec
from maxlm.models.caches.paged import AttentionCache, pad_features
from pallas_kernels.attention.combine import merge_attention
from pallas_kernels.paged_attention import QuantizedPages, paged_attention, write_pages

SCALE_DTYPE = jnp.bfloat16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedCache(AttentionCache):
    """Pages of integers, and each row's last tokens."""

    key: Any
    """:class:`~pallas_kernels.paged_attention.QuantizedPages` of [D, P, K, page, H]."""
    value: Any
    """None: a token's value is the beginning of its key."""
    recent_key: Any
    """[D, R, n, K, page, H]: page i of a row's sequence, not quantized yet, is in place
    i mod n."""
    recent_value: Any
    copies_heads = True

    def attend_shard(self, q, key, value, batch, rules, *, window, sinks, **options):
        """See :class:`AttentionCache`. All is written before anything is read: or XLA
        copies whole pools. Raises MaxlmError: more than a page of tokens of a row that
        decodes."""
        rows, width = batch.uniform_rows
        split = rows * width
        num_recent, _, page = self.recent_key.shape[1:4]
        if width > page:
            what = f"{width} tokens a step of a row that decodes, in pages of {page}"
            raise MaxlmError(
                what, where="cache", fix="guess fewer tokens, or raise page_size"
            )
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        kernel = partial(
            paged_attention,
            window=window,
            dtype=dtype,
            kernel=batch.attention_kernel,
            **options,
        )
        lengths = batch.kv_lengths
        starts = batch.query_starts
        slots, tables = batch.pages(window)

        def count_quantized_pages(num_tokens):
            return jnp.maximum(num_tokens // page - (num_recent - 2), 0)

        first, last = (
            count_quantized_pages(lengths - jnp.diff(starts)),
            count_quantized_pages(lengths),
        )
        new, rings = (
            _list_arrays(key, value),
            _list_arrays(self.recent_key, self.recent_value),
        )
        sizes = [x.shape[-1] for x in new]
        new = [
            pad_features(x, ring.shape[-1]) for x, ring in zip(new, rings, strict=True)
        ]
        q = pad_features(q, rings[0].shape[-1])
        pools = _list_arrays(self.key, self.value)
        live = slots < len(self.key.scale) * page
        calls = []
        for write, of, tokens, begins, uniform in (
            (
                _write_uniform_rows,
                slice(rows),
                slice(split),
                starts[: rows + 1],
                (rows, width),
            ),
            (
                _write_chunks,
                slice(rows, None),
                slice(split, None),
                starts[rows:] - split,
                (0, 0),
            ),
        ):
            own, bounds = (batch.positions[tokens], live[tokens]), (first[of], last[of])
            if not len(own[0]):
                continue
            rings, part = write(rings, [x[tokens] for x in new], *own, batch, bounds)
            pools = _write_quantized(pools, part, tables[of], bounds, sizes)
            call = (
                *_pair(part.pages),
                part.tables,
                lengths[of] - bounds[0] * page,
                begins,
            )
            calls.append(partial(kernel, q[tokens], *call, uniform_rows=uniform))
        limits = {"uniform_rows": (rows, width), "key_limits": first * page}
        old = kernel(q, *_pair(pools), tables, lengths, starts, sinks=sinks, **limits)
        recent = [call() for call in calls]
        if len(recent) > 1:
            recent = [jax.tree.map(lambda *x: jnp.concatenate(x), *recent)]
        y, _ = merge_attention(old, recent[0])
        y = y if value is None else y[..., : value.shape[-1]]
        return y.astype(q.dtype), QuantizedCache(*_pair(pools), *_pair(rings))


def quantized_pages_spec(
    pages: CacheArraySpec, kind: Literal["int8", "int4"], *, per_channel: bool = False
) -> QuantizedPages:
    """Returns a :class:`CacheArraySpec` for each array of quantized pages.

    Args:
        pages: [D, P, K, page, H].
        per_channel: as keys; else per token, as values.
    """
    *lead, page, size = pages.shape
    shape = *lead, size if per_channel else page
    scale: Any = replace(pages, shape=shape, axes=pages.axes[:-1], dtype=SCALE_DTYPE)
    codes: Any = replace(pages, dtype=jnp.int8)
    if kind == "int8":
        return QuantizedPages(codes, scale, None)
    if page % 2:
        what = f"page_size={page} is odd, and int4 keeps two tokens in a byte"
        raise MaxlmError(what, where="cache", fix="use an even number")
    codes = replace(pages, shape=(*lead, page // 2, size), dtype=jnp.uint8)
    return QuantizedPages(codes, scale, scale)


def count_ring_pages(recent: int, page_size: int) -> int:
    """Returns the pages of a row's ring: the recent ones, one that is being filled
    behind them, and one more, so that all tokens of a step find room."""
    return -(-recent // page_size) + 2


def quantize_pages(
    pages: jax.Array, dtype: Any, *, per_channel: bool
) -> QuantizedPages:
    """Rounds [..., page, H] to integers, scales first to bf16, so that codes belong to
    them.

    Args:
        dtype: int8, symmetric from -127 to 127, or uint8 for pairs of 0 to 15 with a
            zero point.
        per_channel: a scale for each channel, as of keys; else for each token.
    """
    x = pages.astype(jnp.float32)
    axis = -2 if per_channel else -1
    top = x.max(axis, keepdims=True)
    bottom = x.min(axis, keepdims=True)
    zero = None
    if dtype == jnp.int8:
        steps = 127
        low = -127
        span = jnp.maximum(top, -bottom)
    else:
        steps = 15
        low = 0
        zero = bottom.astype(SCALE_DTYPE)
        x = x - zero
        span = top - zero
    scale = (jnp.maximum(span, 1e-30) / steps).astype(SCALE_DTYPE)
    codes = jnp.clip(jnp.round(x / scale.astype(jnp.float32)), low, steps).astype(dtype)
    if dtype != jnp.int8:
        first, second = jnp.split(codes, 2, axis=-2)
        codes = first | second << 4
    return QuantizedPages(
        codes, scale.squeeze(axis), zero if zero is None else zero.squeeze(axis)
    )


class _ExactTokens(NamedTuple):
    """The tokens of some rows that are not quantized, and the pages that become so."""

    pages: list[jax.Array]
    """Keys [P', K, page, H], and values if there are any."""
    tables: jax.Array
    """int32 [n, M']: of each row's tokens from its first page that was not quantized
    on."""
    ripe: jax.Array
    """int32 [n, m]: the pages that may become quantized now, in order."""


def _write_uniform_rows(rings, new, positions, live, batch, bounds):
    """Writes tokens of uniform rows into their rings [R, n, K, page, H], and reads them
    there."""
    rows, width = batch.uniform_rows
    num_recent, _, page = rings[0].shape[1:4]
    at = jnp.arange(rows)[:, None] * num_recent
    places = positions.reshape(rows, width)
    slots = ((at + places // page % num_recent) * page + places % page).reshape(-1)
    slots = jnp.where(live, slots, rings[0].size)
    pages = [x.reshape(-1, *x.shape[2:]) for x in rings]
    pages = [write_pages(x, y, slots) for x, y in zip(pages, new, strict=True)]
    tables = at + (bounds[0][:, None] + jnp.arange(num_recent)) % num_recent
    rings = [x.reshape(y.shape) for x, y in zip(pages, rings, strict=True)]
    return rings, _ExactTokens(pages, tables, tables[:, :1])


def _write_chunks(rings, new, positions, live, batch, bounds):
    """Puts chunks' tokens behind the recent ones of their rows, and the last of them in
    rings."""
    num_recent, _, page = rings[0].shape[1:4]
    room = len(positions)
    first, last = bounds
    ids = batch.chunk_rows
    starts = batch.query_starts[-len(ids) - 1 :] - batch.query_starts[-len(ids) - 1]
    count = num_recent - 1 + -(-room // page)
    ring = (first[:, None] + jnp.arange(num_recent - 1)) % num_recent
    pad = (0, 0), (0, count - num_recent + 1), *((0, 0),) * 3
    pages = [jnp.pad(x[ids[:, None], ring], pad) for x in rings]
    pages = [x.reshape(-1, *x.shape[2:]) for x in pages]
    chunk = jnp.searchsorted(starts, jnp.arange(room), side="right") - 1
    chunk = jnp.minimum(chunk, len(ids) - 1)
    slots = jnp.where(
        live, (chunk * count - first[chunk]) * page + positions, pages[0].size
    )
    pages = [write_pages(x, y, slots) for x, y in zip(pages, new, strict=True)]
    tables = jnp.arange(len(ids) * count).reshape(-1, count)
    # Which page each place of a ring has now.
    ring = last[:, None] + (jnp.arange(num_recent) - last[:, None]) % num_recent
    ring = jnp.minimum(ring - first[:, None], count - 1) + tables[:, :1]
    used = jnp.where(starts[1:] > starts[:-1], ids, len(rings[0]))
    rings = [
        x.at[used].set(y[ring], mode="drop") for x, y in zip(rings, pages, strict=True)
    ]
    return rings, _ExactTokens(pages, tables, tables)


def _write_quantized(pools, part: _ExactTokens, page_tables, bounds, sizes):
    """Quantizes pages ``first`` to ``last`` of each row, int32 [n] each, and the first
    of their features, as many as arrays have of their own."""
    first, last = bounds
    index = first[:, None] + jnp.arange(part.ripe.shape[1])
    entries = jnp.take_along_axis(
        page_tables, jnp.minimum(index, page_tables.shape[1] - 1), axis=1
    )
    entries = jnp.where(index < last[:, None], entries, len(pools[0].scale)).reshape(-1)
    ripe = part.ripe.reshape(-1)
    written = []

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[entries].set(pad_features(new, pool.shape[-1]), mode="drop")

    for number, (pool, pages) in enumerate(zip(pools, part.pages, strict=True)):
        own = pages[ripe][..., : sizes[number]]
        new = quantize_pages(own, pool.codes.dtype, per_channel=number == 0)
        written.append(jax.tree.map(write, pool, new))
    return written


def _list_arrays(key: Any, value: Any) -> list[Any]:
    return [key] if value is None else [key, value]


def _pair(arrays: list[Any]) -> tuple[Any, Any]:
    """Keys, and values or None."""
    return arrays[0], arrays[1] if len(arrays) > 1 else None
