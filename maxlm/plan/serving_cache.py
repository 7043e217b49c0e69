"""Bytes of the caches that serving keeps, from what mixers state of their arrays."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import cycle
from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.models.architectures.transformer import Decoder
from maxlm.models.caches.config import (
    CacheConfig,
    PagedCacheConfig,
    QuantizedCacheConfig,
    find_default_page_size,
)
from maxlm.models.caches.layout import (
    CacheLayout,
    LayerCache,
    choose_feature_multiple,
)
from maxlm.models.caches.paged import AttentionCache
from maxlm.models.caches.ragged import RecurrentCache
from maxlm.models.caches.sparse import SparseCache

CacheFormat = Literal["auto", "int8", "int4"]
"""auto: the compute dtype."""
PAGE_TOKENS = 32
"""Tokens of a page of those in the compute dtype."""


class LayerCacheKind(NamedTuple):
    """Arrays that a layer keeps."""

    stack: str
    window: int | None
    """Most tokens that it needs."""
    specs: LayerCache
    """A pytree of :class:`~maxlm.models.caches.CacheArraySpec`, for one row and one
    page."""
    dtype: DTypeLike
    """Dtype of arrays whose specs name none."""
    page_size: int
    """Tokens of a page."""


def count_layer_caches(
    model: Decoder,
    cache: CacheFormat | CacheConfig = "auto",
    platform: str = "cpu",
    head_ways: int = 1,
    num_mtp_modules: int = 0,
    page_size: int | None = None,
) -> Counter[LayerCacheKind]:
    """Counts the layers that have each cache, by
    :meth:`maxlm.models.blocks.Mixer.cache_spec`; ``num_mtp_modules`` of ``mtp`` are
    among them. ``page_size``: tokens of a page; default: as formats have them."""
    if isinstance(cache, CacheConfig):
        config = cache
    elif cache == "auto":
        config = PagedCacheConfig()
    else:
        config = QuantizedCacheConfig(kind=cache)
    if page_size is None:
        page_size = find_default_page_size(config.kind) or PAGE_TOKENS
    layout = CacheLayout(
        num_shards=1,
        num_rows=1,
        num_pages=1,
        page_size=page_size,
        cache=config,
        feature_multiple=choose_feature_multiple(platform),
        num_mtp_modules=num_mtp_modules,
        head_ways=head_ways,
    )
    specs_by_stack = model.cache_specs(layout)
    counts: Counter[LayerCacheKind] = Counter()
    stacks = list(model.config.layer_stacks)
    if num_mtp_modules:
        stacks += [stack for run in model.config.mtp_runs for stack in run.stacks]
    for stack in stacks:
        # Layers take their kinds in turns.
        kinds = cycle(stack.kinds)
        for specs, kind in zip(specs_by_stack[stack.name], kinds, strict=False):
            # Of a cache in pages, what its layer says: a chunk limits it too.
            page_windows = (
                s.window for s in jax.tree.leaves(specs) if s.unit == "page"
            )
            window = next(page_windows, kind.window)
            cache_kind = LayerCacheKind(
                stack.name, window, specs, model.dtype, page_size
            )
            counts[cache_kind] += 1
    return counts


def count_sequence_bytes(
    caches: Mapping[LayerCacheKind, int],
    length: int,
    count_shards: Callable[[tuple[str | None, ...]], float] = lambda axes: 1,
) -> float:
    """Counts the bytes that a sequence of ``length`` tokens has on a device.

    Args:
        count_shards: parts that an array of these logical axes is split into; default:
            one.
    """
    size = 0.0
    for layer, num_layers in caches.items():
        pages = -(-length // layer.page_size)
        if layer.window is not None:
            # A window may begin and end within a page.
            window_pages = -(-(layer.window - 1) // layer.page_size) + 1
            pages = min(pages, window_pages)
        for array in jax.tree.leaves(layer.specs):
            # Shapes are of one page, or of what a row keeps whatever its length.
            elements = prod(array.shape)
            if array.unit == "page":
                elements *= pages
            itemsize = jnp.dtype(array.dtype or layer.dtype).itemsize
            # Without the first axis, which counts shards of the batch.
            num_shards = float(count_shards(array.axes[1:]))
            size += num_layers * elements * itemsize / num_shards
    return size


def count_state_bytes(
    caches: Mapping[LayerCacheKind, int],
    count_shards: Callable[[tuple[str | None, ...]], float] = lambda axes: 1,
) -> float:
    """Counts the bytes that a sequence has on a device in caches of recurrences, which
    every token changes as a whole.

    Args:
        count_shards: see :func:`count_sequence_bytes`.
    """
    recurrent = Counter()
    for layer, num_layers in caches.items():
        states = tuple(
            leaf
            for leaf in jax.tree.leaves(layer.specs, is_leaf=_is_layer_cache)
            if isinstance(leaf, RecurrentCache)
        )
        recurrent[layer._replace(specs=states)] += num_layers
    return count_sequence_bytes(recurrent, 0, count_shards)


def find_attention_cache(specs: LayerCache) -> AttentionCache | SparseCache | None:
    """Returns the cache of a layer's attention, which may lie beside another mixer's.
    None: the layer has none, or reads another layer's."""
    for leaf in jax.tree.leaves(specs, is_leaf=_is_layer_cache):
        if isinstance(leaf, AttentionCache | SparseCache):
            return leaf
    return None


def _is_layer_cache(tree: object) -> bool:
    return isinstance(tree, AttentionCache | SparseCache | RecurrentCache)


def count_token_bytes(caches: Mapping[LayerCacheKind, int]) -> float:
    """Counts the bytes that one more token takes, before a window is full."""
    page = max(layer.page_size for layer in caches)
    one_page = count_sequence_bytes(caches, page)
    two_pages = count_sequence_bytes(caches, 2 * page)
    return (two_pages - one_page) / page
