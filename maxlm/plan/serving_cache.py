"""Bytes of the caches that serving keeps, from what mixers state of their arrays."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.architectures.transformer import Decoder
from maxlm.models.caches.config import (
    PagedCacheConfig,
    QuantizedCacheConfig,
    find_default_page_size,
)
from maxlm.models.caches.layout import CacheLayout, choose_feature_multiple

CacheFormat = Literal["auto", "int8", "int4"]
"""auto: the compute dtype."""
PAGE_TOKENS = 32
"""Tokens of a page of those in the compute dtype."""


class LayerCache(NamedTuple):
    """Arrays that a layer keeps."""

    stack: str
    window: int | None
    """Most tokens that it needs."""
    specs: Any
    """:class:`~maxlm.models.caches.CacheArraySpec` of its arrays, for one row and one
    page."""
    dtype: Any
    """Dtype of arrays whose specs name none."""
    page_size: int


def count_layer_caches(
    model: Decoder,
    cache: CacheFormat = "auto",
    platform: str = "cpu",
    head_ways: int = 1,
) -> Counter[LayerCache]:
    """Counts the layers that have each cache, by
    :meth:`maxlm.models.blocks.Mixer.cache_spec`."""
    config = PagedCacheConfig() if cache == "auto" else QuantizedCacheConfig(kind=cache)
    multiple = choose_feature_multiple(platform)
    page = find_default_page_size(config.kind) or PAGE_TOKENS
    specs = model.cache_specs(
        CacheLayout(1, 1, 1, page, None, config, multiple, head_ways)
    )
    return Counter(
        LayerCache(part.name, kind.window, own, model.dtype, page)
        for part in model.config.layer_stacks
        for own, kind in zip(specs[part.name], cycle(part.kinds), strict=False)
    )


def count_sequence_bytes(
    caches: Mapping[LayerCache, int],
    length: int,
    count_shards: Callable[[Any], Any] = lambda axes: 1,
) -> float:
    """Counts the bytes that a sequence of ``length`` tokens has on a device.
    ``count_shards``: parts that an array of these logical axes is split into; default:
    one."""
    size = 0.0
    for layer, num_layers in caches.items():
        pages = -(-length // layer.page_size)
        if layer.window is not None:  # it may begin and end within a page
            pages = min(pages, -(-(layer.window - 1) // layer.page_size) + 1)
        for array in jax.tree.leaves(layer.specs):
            numbers = prod(array.shape) * (pages if array.unit == "page" else 1)
            itemsize = jnp.dtype(array.dtype or layer.dtype).itemsize
            size += (
                num_layers * numbers * itemsize / float(count_shards(array.axes[1:]))
            )
    return size


def count_token_bytes(caches: Mapping[LayerCache, int]) -> float:
    """Counts the bytes that one more token takes, before a window is full."""
    page = max(layer.page_size for layer in caches)
    one, two = (count_sequence_bytes(caches, pages * page) for pages in (1, 2))
    return (two - one) / page
