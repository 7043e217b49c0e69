"""The cache of a layer of attention, as the layout says."""

from maxlm.models.caches.config import PagedCacheConfig, QuantizedCacheConfig
from maxlm.models.caches.evicting import EvictingCache, evicting_cache_spec
from maxlm.models.caches.layout import CacheArraySpec, CacheLayout
from maxlm.models.caches.paged import PagedCache
from maxlm.models.caches.quantized import (
    QuantizedCache,
    count_ring_pages,
    quantized_cache_spec,
)


def kv_cache_spec(
    layout: CacheLayout,
    window: int | None,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int] | None,
    heads_axis: str | None,
) -> PagedCache | QuantizedCache | EvictingCache:
    """Returns a layer's cache of keys and values with a :class:`CacheArraySpec` for each array.

    Args:
        key_shape, value_shape: (heads, size); no values: they are part of the keys.
        heads_axis: the heads' logical axis.

    Raises:
        MaxlmError: pages that int4 codes do not fit in.
    """
    shapes, config = (key_shape, value_shape), layout.cache
    if not isinstance(config, PagedCacheConfig | QuantizedCacheConfig):
        return evicting_cache_spec(layout, config, window, *shapes, heads_axis)
    axes = ("batch", None, heads_axis, None, None)
    lead = layout.num_shards, layout.count_pages(window)

    def pages_spec(shape: tuple[int, int]) -> CacheArraySpec:
        heads, size = shape
        size = -(-size // layout.feature_multiple) * layout.feature_multiple
        return CacheArraySpec((*lead, heads, layout.page_size, size), axes, unit="page")

    pages = pages_spec(key_shape), None if value_shape is None else pages_spec(value_shape)
    if isinstance(config, PagedCacheConfig):
        return PagedCache(*pages)
    room = (count_ring_pages(config.recent, layout.page_size) - 1) * layout.page_size
    if window is not None and window <= room:
        return PagedCache(*pages)  # all that it sees would be kept as it is
    return quantized_cache_spec(layout, config, *pages)
