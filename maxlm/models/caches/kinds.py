"""The kinds of caches of a layer of attention, and the arrays that each has.

To add one, write its config and its cache in a file here, make a
:class:`RegisteredCache` of them and name it in ``CACHES``, or register it from outside:
``CACHES.register("kind", RegisteredCache(...))``, or an installed package's entry point
of the group ``maxlm.caches``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.models.caches.config import (
    CACHES,
    CacheConfig,
    EvictingCacheConfig,
    HeavyHittersCacheConfig,
    PagedCacheConfig,
    QuantizedCacheConfig,
    SinksCacheConfig,
    SnapKVCacheConfig,
)
from maxlm.models.caches.evicting import EvictingCache
from maxlm.models.caches.layout import (
    CacheArraySpec,
    CacheLayout,
    LayerCache,
    as_array,
)
from maxlm.models.caches.paged import AttentionCache, PagedCache
from maxlm.models.caches.quantized import (
    QuantizedCache,
    count_ring_pages,
    quantized_pages_spec,
)
from maxlm.parallel.ulysses import count_kv_copies
from pallas_kernels.paged_attention import QuantizedPages


@dataclass(frozen=True)
class KeyValueSizes:
    """What a layer of attention keeps of a token, and how long."""

    window: int | None
    """Tokens that a token sees; None: all before it."""
    num_kv_heads: int
    key_size: int
    value_size: int | None
    """None: all query heads share one head of keys, of which values are a part."""
    chunk: int | None = None
    """Positions of a chunk, whose tokens alone see each other; None: all do."""

    @property
    def sizes(self) -> list[int]:
        """Sizes of a head's arrays: keys, and values where they have their own."""
        if self.value_size is None:
            return [self.key_size]
        return [self.key_size, self.value_size]

    @property
    def missing(self) -> list[None]:
        """None for each array that there is not."""
        return [None] * (2 - len(self.sizes))

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of keys and values: batch, place, kv heads, token, feature."""
        heads = "kv_heads" if self.value_size is not None else None
        return ("batch", None, heads, None, None)


@dataclass(frozen=True)
class RegisteredCache:
    """A cache of attention by its kind.

    Args:
        config: its settings, for the engine's ``cache``.
        make_spec: returns a layer's cache with a :class:`CacheArraySpec` for each
            array. Raises MaxlmError: sizes that the cache cannot keep.
        page_size: tokens of a page where none are set; None: the engine's default.
    """

    config: type[CacheConfig]
    make_spec: Callable[[CacheLayout, KeyValueSizes], AttentionCache]
    page_size: int | None = None


def kv_cache_spec(
    layout: CacheLayout,
    window: int | None,
    num_kv_heads: int,
    key_size: int,
    value_size: int | None,
    *,
    chunk: int | None = None,
    is_shared: bool = False,
) -> LayerCache:
    """Returns a layer's cache of keys and values with a :class:`CacheArraySpec` for
    each array.

    Args:
        value_size: None: all query heads share one head of keys, of which values are a
            part.
        chunk: positions of a chunk, whose tokens alone see each other; None: all do.
        is_shared: whether the layer reads the cache of another one of the same sizes,
            and so has none: an empty tree.

    Raises:
        MaxlmError: sizes that the cache cannot keep; a cache that does not know chunks,
            or that no other layer can read.
    """
    kind = layout.cache.kind
    sizes = KeyValueSizes(window, num_kv_heads, key_size, value_size, chunk)
    spec = CACHES.get(kind).make_spec(layout, sizes)
    if chunk is not None and not spec.knows_chunks:
        raise MaxlmError(
            f"a cache of kind={kind} for attention in chunks of {chunk} positions",
            where="cache",
            fix="use kind=paged",
        )
    if not is_shared:
        return spec
    if not spec.can_be_shared:
        raise MaxlmError(
            f"a cache of kind={kind} for layers that share keys and values",
            where="cache",
            fix="use kind=paged",
        )
    return ()


def _list_page_specs(layout: CacheLayout, sizes: KeyValueSizes) -> list[CacheArraySpec]:
    """Declares the pages of keys, and of values where they have their own."""
    num_kv_heads = sizes.num_kv_heads
    axes = sizes.axes
    if sizes.value_size is not None:
        # Pages have a copy of a kv head for each device whose query heads read it.
        num_kv_heads *= count_kv_copies(num_kv_heads, layout.head_ways)
        axes = (*axes[:2], "heads", *axes[3:])
    num_pages = layout.count_pages(sizes.window)
    multiple = layout.feature_multiple
    specs = []
    for size in sizes.sizes:
        padded_size = -(-size // multiple) * multiple
        shape = (
            layout.num_shards,
            num_pages,
            num_kv_heads,
            layout.page_size,
            padded_size,
        )
        specs.append(CacheArraySpec(shape, axes, unit="page", window=sizes.window))
    return specs


def _make_paged_spec(layout: CacheLayout, sizes: KeyValueSizes) -> PagedCache:
    pages = [as_array(spec) for spec in _list_page_specs(layout, sizes)]
    return PagedCache(*pages, *sizes.missing)


def _make_quantized_spec(layout: CacheLayout, sizes: KeyValueSizes) -> AttentionCache:
    config = cast(QuantizedCacheConfig, layout.cache)
    pages = _list_page_specs(layout, sizes)
    ring_pages = count_ring_pages(config.recent, layout.page_size)
    window = sizes.window
    if window is not None and window <= (ring_pages - 1) * layout.page_size:
        # All that a token sees would be kept as it is.
        return _make_paged_spec(layout, sizes)

    quantized: list[QuantizedPages] = []
    rings: list[jax.Array] = []
    for index, spec in enumerate(pages):
        # Keys have a scale per channel, values one per token (KIVI, section 3).
        is_key = index == 0
        quantized.append(quantized_pages_spec(spec, config.kind, per_channel=is_key))
        # Pages [D, P, K, page, H] → rings [D, R, n, K, page, H].
        shape = (layout.num_shards, layout.num_rows, ring_pages, *spec.shape[2:])
        axes = (*sizes.axes[:2], None, *spec.axes[2:])
        rings.append(as_array(CacheArraySpec(shape, axes)))
    has_values = sizes.value_size is not None
    return QuantizedCache(
        key=quantized[0],
        value=quantized[1] if has_values else None,
        recent_key=rings[0],
        recent_value=rings[1] if has_values else None,
    )


def _make_evicting_spec(layout: CacheLayout, sizes: KeyValueSizes) -> EvictingCache:
    config = cast(EvictingCacheConfig, layout.cache)
    # Behind a window nothing is worth keeping.
    num_tokens = min(config.budget, sizes.window or config.budget)
    shape = (layout.num_shards, layout.num_rows, sizes.num_kv_heads, num_tokens)

    def declare_features(size: int) -> jax.Array:
        return as_array(CacheArraySpec((*shape, size), sizes.axes))

    def declare_per_token(dtype: DTypeLike) -> jax.Array:
        return as_array(CacheArraySpec(shape, sizes.axes[:-1], dtype))

    value = None
    if sizes.value_size is not None:
        value = declare_features(sizes.value_size)
    has_scores = not isinstance(config, SinksCacheConfig)
    return EvictingCache(
        key=declare_features(sizes.key_size),
        value=value,
        positions=declare_per_token(jnp.int32),
        scores=declare_per_token(jnp.float32) if has_scores else None,
        config=config,
    )


PAGED = RegisteredCache(PagedCacheConfig, _make_paged_spec)
# A page shares a scale: as many tokens as the TPU's kernel takes at least.
INT8 = RegisteredCache(QuantizedCacheConfig, _make_quantized_spec, page_size=32)
INT4 = RegisteredCache(QuantizedCacheConfig, _make_quantized_spec, page_size=64)
SINKS = RegisteredCache(SinksCacheConfig, _make_evicting_spec)
HEAVY_HITTERS = RegisteredCache(HeavyHittersCacheConfig, _make_evicting_spec)
SNAPKV = RegisteredCache(SnapKVCacheConfig, _make_evicting_spec)
