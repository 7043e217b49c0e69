"""Attention over caches on a mesh: each device with its own sequences and heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules
from pallas_kernels.paged_attention import paged_attention, write_pages


class PagedRows(NamedTuple):
    """The sequences of a step's tokens and the pages that hold their keys; axis D counts shards of
    the batch."""

    slots: jax.Array
    """int32 [D, S]: where each token is written, page · page_size + offset; past the last page: it
    is not."""
    page_tables: jax.Array
    """int32 [D, R, M]."""
    kv_lengths: jax.Array
    """int32 [D, R]: tokens of each sequence, these included."""
    query_starts: jax.Array
    """int32 [D, R + 1]: sequence r has the tokens from ``query_starts[r]`` on."""


def map_attention(
    local: Callable[..., tuple[jax.Array, Any]],
    q: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    cache: Any,
    cache_specs: Any,
    where: Any,
    rules: AxisRules,
    *,
    slopes: Any = None,
    biases: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Maps attention with a cache over devices.

    Args:
        local: ``(q, key, value, cache, where, slopes, biases) -> (y [S, N, Hv], cache)`` for one
            shard, without D.
        q: [D, S, N, H].
        key, value: [D, S, K, H] and [D, S, K, Hv], or none.
        cache_specs: layouts of the cache's arrays, or of all.
        where: a tree of arrays [D, ...].
        slopes, biases: [N] and [N, 2R + 1].

    Returns:
        [D, S, N, Hv], and the cache.
    """

    def run(slopes, biases, *sharded):
        own = jax.tree.map(lambda x: x[0], sharded)
        return jax.tree.map(lambda x: x[None], local(*own, slopes, biases))

    heads, own_heads = rules.spec("batch", None, "heads"), rules.spec("heads")
    keys = rules.spec("batch", None, "kv_heads")
    slopes, biases = (
        None if x is None else reshard(jnp.asarray(x, jnp.float32), own_heads)
        for x in (slopes, biases)
    )
    specs = own_heads, own_heads, heads, keys, keys, cache_specs, rules.spec("batch")
    run = map_shards(run, specs, (heads, cache_specs))
    return run(slopes, biases, q, key, value, cache, where)


def write_and_attend(
    q: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    key_pages: Any,
    value_pages: Any,
    where: PagedRows,
    *,
    uniform_rows: tuple[int, int],
    rules: AxisRules,
    slopes: Any = None,
    biases: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any, Any]:
    """Writes tokens' keys and values into their pages, then attends to each token's sequence up to
    it; no communication.

    Args:
        q: [D, S, N, H].
        key, value: [D, S, K, H] and [D, S, K, Hv]; no value: it is part of the key.
        key_pages, value_pages: [D, P, K, page, H] and [D, P, K, page, Hv], or wider ones.
        uniform_rows, options: as of ``pallas_kernels.paged_attention``.
        slopes, biases: [N] and [N, 2R + 1].

    Returns:
        [D, S, N, Hv], and the pages.
    """
    options["scale"] = options.get("scale") or q.shape[-1] ** -0.5
    num_values = options["value_dim"] if value is None else value.shape[-1]

    def local(q, key, value, pages, where, slopes, biases):
        key_pages, value_pages = pages
        q, key = (pad_features(x, key_pages.shape[-1]) for x in (q, key))
        key_pages = write_pages(key_pages, key, where.slots)
        if value is not None:
            value = pad_features(value, value_pages.shape[-1])
            value_pages = write_pages(value_pages, value, where.slots)
        rows = where.page_tables, where.kv_lengths, where.query_starts
        own = {"uniform_rows": uniform_rows, "slopes": slopes, "biases": biases, **options}
        y, _ = paged_attention(q, key_pages, value_pages, *rows, **own)
        return y[..., :num_values], (key_pages, value_pages)

    specs, pages = rules.spec("batch", None, "kv_heads"), (key_pages, value_pages)
    by_head = {"slopes": slopes, "biases": biases}
    y, pages = map_attention(local, q, key, value, pages, specs, where, rules, **by_head)
    return y, *pages


def pad_features(x: jax.Array, size: int) -> jax.Array:
    """Pads the last dimension with zeros up to ``size``."""
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, size - x.shape[-1])))
