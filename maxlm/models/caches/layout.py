"""Sizes and arrays of caches before they are allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.models.caches.config import CacheConfig, PagedCacheConfig
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import LANES
from maxlm.sharding import AxisRules, resolve_placement

LayerCache = Any
"""What one layer keeps between tokens: a pytree that its mixer alone knows, such as an
:class:`~maxlm.models.caches.paged.AttentionCache`."""


@dataclass(frozen=True)
class CacheArraySpec:
    """An array of a layer's cache before it is allocated."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension."""
    dtype: DTypeLike | None = None
    """None: the compute dtype."""
    unit: Literal["row", "page"] = "row"
    """What the second dimension counts: rows, or pages."""
    window: int | None = None
    """Tokens that a token of a layer with pages sees; None: all."""


def as_array(spec: CacheArraySpec) -> jax.Array:
    """Returns a declaration as a type checker takes it where it stands in the place of
    a cache's array."""
    return cast(jax.Array, spec)


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of the caches of all layers."""

    num_shards: int
    """D: ways in which sequences are split over devices."""
    num_rows: int
    """Sequences of a shard that run at once."""
    num_pages: int
    """Pages of a shard and layer, for layers that see everything."""
    page_size: int
    """Tokens in a page."""
    num_window_pages: int | None = None
    """Pages for layers with a window; None: as many as for the others."""
    cache: CacheConfig = field(default_factory=PagedCacheConfig)
    """How attention keeps keys and values."""
    feature_multiple: int = 1
    """Pages have room for a head's features up to a multiple of this: a TPU's kernel
    reads whole lanes, and XLA would copy all pages to make it so."""
    num_mtp_modules: int = 0
    """Modules of the model's ``mtp``, the first ones, that have caches, to guess tokens
    with."""
    head_ways: int = 1
    """Devices that query heads are split over. Where kv heads are fewer, pages have one
    for each device, the one that its queries read."""

    def count_pages(self, window: int | None) -> int:
        """Returns the pages of a layer with a window, or none."""
        if window is None or self.num_window_pages is None:
            return self.num_pages
        return self.num_window_pages


def choose_feature_multiple(platform: str) -> int:
    """Returns a platform's :attr:`CacheLayout.feature_multiple`."""
    return LANES if platform == "tpu" else 1


def allocate_cache_array(
    array: CacheArraySpec, rules: AxisRules, dtype: DTypeLike
) -> jax.Array:
    """Returns zeros in their compute layout on the current mesh. Raises MaxlmError:
    dimensions that do not divide over their mesh axes."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    spec = resolve_placement("cache", array.shape, array.axes, rules, sizes).spec
    return jnp.zeros(array.shape, array.dtype or dtype, out_sharding=spec)


class CachedModel(Protocol):
    """A model that decodes."""

    def cache_specs(self, layout: CacheLayout) -> PyTree:
        """Returns its caches, with a :class:`CacheArraySpec` for each array."""
        ...


def list_paged_windows(
    model: CachedModel, cache: CacheConfig | None = None, num_mtp_modules: int = 0
) -> tuple[int | None, ...]:
    """Lists the windows of layers that keep pages, each once, ``num_mtp_modules`` of
    ``mtp`` among them; None: a layer that sees all."""
    # Sizes do not matter, but that int4 wants pages of an even number of tokens.
    layout = CacheLayout(
        num_shards=1,
        num_rows=1,
        num_pages=2,
        page_size=2,
        cache=cache or PagedCacheConfig(),
        num_mtp_modules=num_mtp_modules,
    )
    specs = jax.tree.leaves(model.cache_specs(layout))
    return tuple(dict.fromkeys(spec.window for spec in specs if spec.unit == "page"))


def has_unit(specs: PyTree, unit: Literal["row", "page"]) -> bool:
    """Returns whether a tree of :class:`CacheArraySpec` has an array by row, or by
    page."""
    return any(spec.unit == unit for spec in jax.tree.leaves(specs))


def has_row_caches(caches: Mapping[str, Sequence[LayerCache]]) -> bool:
    """Returns whether a model's :class:`CacheArraySpec` trees, by stack and layer, have
    a layer with a cache that keeps all it has by row, so that no token can be taken
    back: a state, or keys of which some are dropped. A layer of several mixers has a
    tuple of caches; one without a mixer has none."""
    layers = [layer for stack in caches.values() for layer in stack]
    return any(_keeps_rows_alone(layer) for layer in layers)


def _keeps_rows_alone(cache: LayerCache) -> bool:
    # A tuple proper: a cache that is a NamedTuple is one cache.
    if type(cache) is tuple:
        return any(_keeps_rows_alone(part) for part in cache)
    return has_unit(cache, "row") and not has_unit(cache, "page")
