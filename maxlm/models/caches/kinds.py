"""The cache of a layer of attention, as the layout says."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from maxlm.models.caches.config import (
    EvictingCacheConfig,
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
    config = layout.cache
    if not isinstance(config, PagedCacheConfig | QuantizedCacheConfig):
        return _evicting_cache_spec(
            layout, config, window, num_kv_heads, key_size, value_size
        )

    head_axis = None
    if value_size is not None:
        # Split as query heads are, with copies where devices are more than kv heads.
        head_axis = "heads"
        num_kv_heads *= count_kv_copies(num_kv_heads, layout.head_ways)
    declare_pages = partial(_pages_spec, layout, window, num_kv_heads, head_axis)
    key = declare_pages(key_size)
    value = None if value_size is None else declare_pages(value_size)
    if isinstance(config, PagedCacheConfig):
        return _cache_of_specs(PagedCache, key, value)

    ring_pages = count_ring_pages(config.recent, layout.page_size)
    if window is not None and window <= (ring_pages - 1) * layout.page_size:
        # All that it sees would be kept as it is.
        return _cache_of_specs(PagedCache, key, value)
    declare_ring = partial(_ring_spec, layout, ring_pages)
    return _cache_of_specs(
        QuantizedCache,
        quantized_pages_spec(key, config.kind, per_channel=True),
        None if value is None else quantized_pages_spec(value, config.kind),
        declare_ring(key),
        None if value is None else declare_ring(value),
    )


def _evicting_cache_spec(
    layout: CacheLayout,
    config: EvictingCacheConfig,
    window: int | None,
    num_kv_heads: int,
    key_size: int,
    value_size: int | None,
) -> EvictingCache:
    head_axis = None if value_size is None else "kv_heads"
    axes = ("batch", None, head_axis, None)
    num_tokens = min(config.budget, window or config.budget)
    shape = (layout.num_shards, layout.num_rows, num_kv_heads, num_tokens)
    key = CacheArraySpec((*shape, key_size), (*axes, None))
    value = None
    if value_size is not None:
        value = CacheArraySpec((*shape, value_size), (*axes, None))
    positions = CacheArraySpec(shape, axes, jnp.int32)
    scores = None
    if not isinstance(config, SinksCacheConfig):
        scores = CacheArraySpec(shape, axes, jnp.float32)
    return _cache_of_specs(EvictingCache, key, value, positions, scores, config)


def _pages_spec(
    layout: CacheLayout,
    window: int | None,
    num_kv_heads: int,
    head_axis: str | None,
    head_size: int,
) -> CacheArraySpec:
    """Declares pages [D, P, K, page, H], H rounded up to the layout's multiple."""
    multiple = layout.feature_multiple
    padded_size = -(-head_size // multiple) * multiple
    shape = (
        layout.num_shards,
        layout.count_pages(window),
        num_kv_heads,
        layout.page_size,
        padded_size,
    )
    axes = ("batch", None, head_axis, None, None)
    return CacheArraySpec(shape, axes, unit="page", window=window)


def _ring_spec(
    layout: CacheLayout, ring_pages: int, pages: CacheArraySpec
) -> CacheArraySpec:
    """Declares the ring [D, R, n, K, page, H] of each row's last pages, such as
    ``pages`` [D, P, K, page, H]."""
    shape = (layout.num_shards, layout.num_rows, ring_pages, *pages.shape[2:])
    axes = (*pages.axes[:2], None, *pages.axes[2:])
    return CacheArraySpec(shape, axes)


def _cache_of_specs(cache: Any, *specs: Any) -> Any:
    """Builds a cache with declarations where its arrays will be."""
    return cache(*specs)
