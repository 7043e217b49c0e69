"""Caches: what a mixer keeps of earlier tokens, so that a new one costs as little as it can.

A step of inference runs tokens of several sequences side by side, [D, S], D counting the shards of
the batch: first those of ``uniform_rows``, sequences that continue by the same number of tokens
each, then chunks of prompts (:class:`RaggedBatch`). A cache is a pytree of arrays that one mixer
reads and writes; layers only hand it on. Attention's take tokens by ``attend``, which also answers
their queries: :class:`PagedCache` keeps all as it is, ``QuantizedCache`` in fewer bits,
``EvictingCache`` a fixed number of tokens. A mixer with a state instead of keys keeps a
:class:`RecurrentCache`.
"""

from maxlm.models.caches.config import (
    QUANTIZED_PAGE_SIZE,
    CacheConfig,
    PagedCacheConfig,
    QuantizedCacheConfig,
)
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.layout import (
    CacheArraySpec,
    CacheLayout,
    allocate_cache_array,
    choose_feature_multiple,
    has_row_caches,
    has_unit,
    list_paged_windows,
)
from maxlm.models.caches.paged import CrossCache, PagedCache
from maxlm.models.caches.ragged import RaggedBatch, RecurrentCache

__all__ = [
    "QUANTIZED_PAGE_SIZE",
    "CacheArraySpec",
    "CacheConfig",
    "CacheLayout",
    "CrossCache",
    "PagedCache",
    "PagedCacheConfig",
    "QuantizedCacheConfig",
    "RaggedBatch",
    "RecurrentCache",
    "allocate_cache_array",
    "choose_feature_multiple",
    "has_row_caches",
    "has_unit",
    "kv_cache_spec",
    "list_paged_windows",
]
