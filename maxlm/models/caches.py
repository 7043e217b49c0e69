"""Caches: what a mixer keeps of earlier tokens, so that a new one costs as little as it can.

A cache is a pytree of arrays that one mixer reads and writes; layers only hand it on. Those of
attention here take tokens by ``append``, which also says which keys and values the new tokens
attend to. A mixer with a state instead of slots brings a cache of its own.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.parallel.attention import gather_cache_with_new, write_cache_slots
from maxlm.sharding import AxisRules


@dataclass(frozen=True)
class CacheArraySpec:
    """An array of a layer's cache before it is allocated."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension."""
    dtype: Any = None
    """None: the compute dtype."""


class VisibleKeys(NamedTuple):
    """The keys and values that new tokens attend to."""

    key: jax.Array
    """[B, T, K, H]."""
    value: jax.Array
    mask: dict[str, Any]
    """Arguments of ``sharded_attention`` that say which are visible to which token."""


class ContiguousCache(NamedTuple):
    """Keys and values [B, T, K, H] of all tokens; slot t holds position t.

    A token's slot needs no bookkeeping, and rows of unequal length share a batch: padding lies
    behind a row's tokens, which overwrite it before anything reads it.
    """

    key: Any
    value: Any

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        rules: AxisRules,
    ) -> tuple["ContiguousCache", VisibleKeys]:
        """Returns the cache with new tokens in it, and what these attend to.

        Args:
            key, value: [B, S, K, H].
            positions: int [B, S], consecutive in each row; from T on they are not written.
            lengths: int [B], tokens of each row so far, where others are padding; None: none are.
        """
        cache = ContiguousCache(
            write_cache_slots(self.key, key, positions, rules=rules),
            write_cache_slots(self.value, value, positions, rules=rules),
        )
        # Slots not yet written lie after every query, so the causal mask hides them too.
        return cache, VisibleKeys(cache.key, cache.value, {"q_positions": positions})


class RingCache(NamedTuple):
    """Keys and values [B, W, K, H] of a window's last W tokens; position p is in slot p mod W."""

    key: Any
    value: Any

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
        rules: AxisRules,
    ) -> tuple["RingCache", VisibleKeys]:
        """See :meth:`ContiguousCache.append`; new tokens see the W before them and each other."""
        window = self.key.shape[1]
        first = positions[:, :1]
        before = first - window + jnp.arange(window, dtype=positions.dtype)  # [B, W]
        visible = jnp.concatenate([before >= 0, positions >= 0], axis=1).astype(jnp.int32)
        mask = {
            "q_positions": positions - first + window,
            "segment_ids": (jnp.ones_like(positions), visible),
        }
        keys = VisibleKeys(
            gather_cache_with_new(self.key, key, before % window, rules=rules),
            gather_cache_with_new(self.value, value, before % window, rules=rules),
            mask,
        )
        # Padding must not take the slots of tokens, nor tokens those of later ones.
        ends = positions[:, -1:] + 1 if lengths is None else lengths[:, None]
        kept = (positions < ends) & (positions >= ends - window)
        slots = jnp.where(kept, positions % window, window)
        cache = RingCache(
            write_cache_slots(self.key, key, slots, rules=rules),
            write_cache_slots(self.value, value, slots, rules=rules),
        )
        return cache, keys


def kv_cache_spec(
    batch: int,
    length: int,
    window: int | None,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    heads_axis: str | None,
) -> ContiguousCache | RingCache:
    """Returns a layer's cache of keys and values with a :class:`CacheArraySpec` for each array.

    Rows have ``length`` tokens at most, of which a token sees ``window``; a cache is no longer.
    ``key_shape`` and ``value_shape`` are (heads, size), ``heads_axis`` is the heads' logical axis.
    """
    slots = length if window is None else min(window, length)
    axes = ("batch", None, heads_axis, None)
    arrays = (CacheArraySpec((batch, slots, *sizes), axes) for sizes in (key_shape, value_shape))
    return (RingCache if slots < length else ContiguousCache)(*arrays)
