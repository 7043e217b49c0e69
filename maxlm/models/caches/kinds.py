"""The cache of a layer of attention, as the layout says."""

from functools import partial

import jax.numpy as jnp

from maxlm.models.caches.config import (
    PagedCacheConfig,
    QuantizedCacheConfig,
    SinksCacheConfig,
)
from maxlm.models.caches.evicting import EvictingCache
from maxlm.models.caches.layout import CacheArraySpec, CacheLayout
from maxlm.models.caches.paged import AttentionCache, PagedCache
from maxlm.models.caches.quantized import (
    QuantizedCache,
    count_ring_pages,
    quantized_pages_spec,
)
from maxlm.parallel.ulysses import count_kv_copies


def kv_cache_spec(
    layout: CacheLayout,
    window: int | None,
    num_kv_heads: int,
    key_size: int,
    value_size: int | None,
) -> AttentionCache:
    """Returns a layer's cache of keys and values with a :class:`CacheArraySpec` for
    each array. ``value_size`` None: all query heads share one head of keys, of which
    values are a part. Raises MaxlmError: pages that int4 codes do not fit in."""
    config, shards, rows = layout.cache, layout.num_shards, layout.num_rows
    sizes = [key_size] if value_size is None else [key_size, value_size]
    no_value = [None] * (2 - len(sizes))
    axes = ("batch", None, None if no_value else "kv_heads", None, None)
    if not isinstance(config, PagedCacheConfig | QuantizedCacheConfig):
        room = min(config.budget, window or config.budget)
        kept = [
            CacheArraySpec((shards, rows, num_kv_heads, room, size), axes)
            for size in sizes
        ]
        key, value = [*kept, *no_value]
        each = partial(CacheArraySpec, (shards, rows, num_kv_heads, room), axes[:-1])
        scores = None if isinstance(config, SinksCacheConfig) else each(jnp.float32)
        return EvictingCache(key, value, each(jnp.int32), scores, config)
    if not no_value:
        num_kv_heads *= count_kv_copies(num_kv_heads, layout.head_ways)
        axes = (*axes[:2], "heads", *axes[3:])
    page = layout.page_size
    multiple = layout.feature_multiple
    pages = []
    for size in sizes:
        width = -(-size // multiple) * multiple
        shape = shards, layout.count_pages(window), num_kv_heads, page, width
        pages.append(CacheArraySpec(shape, axes, unit="page", window=window))
    if isinstance(config, PagedCacheConfig):
        return PagedCache(*pages, *no_value)
    ring = count_ring_pages(config.recent, page)
    if window is not None and window <= (ring - 1) * page:
        return PagedCache(*pages, *no_value)  # all that it sees would be kept as it is
    codes = [
        quantized_pages_spec(own, config.kind, per_channel=index == 0)
        for index, own in enumerate(pages)
    ]
    recent = [
        CacheArraySpec(
            (shards, rows, ring, *own.shape[2:]), (*axes[:2], None, *axes[2:])
        )
        for own in pages
    ]
    return QuantizedCache(*codes, *no_value, *recent, *no_value)
