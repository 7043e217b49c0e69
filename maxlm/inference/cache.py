"""The key-value cache: what a decoder keeps of the tokens it has seen, allocated once.

All layers lie in one pair of arrays [L, B, T, K, H]; slot t of a row holds its position t, so a
token's slot needs no bookkeeping and rows of unequal length share a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.layers.attention import KVCache
from maxlm.sharding import AxisRules, place

CACHE_AXES = ("layers", "batch", None, "kv_heads", None)


def cache_shape(config: DecoderConfig, batch: int, length: int) -> tuple[int, ...]:
    """[L, B, T, K, H] of the keys, and again of the values."""
    attention = config.attention
    return (config.num_layers, batch, length, attention.num_kv_heads, attention.head_dim)


def cache_bytes(config: DecoderConfig, batch: int, length: int, dtype: Any) -> int:
    """Bytes of keys and values together, over all devices."""
    layers, _, _, heads, size = cache_shape(config, batch, length)
    return 2 * layers * batch * length * heads * size * jnp.dtype(dtype).itemsize


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: Any, rules: AxisRules
) -> KVCache:
    """An empty cache, created in its compute layout on the current mesh; pure, also under jit.

    Args:
        batch: rows B; a multiple of the devices that ``rules.batch`` splits them over.
        length: slots T of each row.
        dtype: the model's compute dtype.
        rules: compute layout, as the model's own.

    Raises:
        MaxlmError: rows or kv heads that do not divide over their mesh axes.
    """
    shape = cache_shape(config, batch, length)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    spec = place("cache", shape, CACHE_AXES, rules, sizes).spec
    return KVCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in KVCache._fields))
