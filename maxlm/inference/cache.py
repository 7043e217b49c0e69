"""The key-value cache: what a decoder keeps of the tokens it has seen, allocated once.

All layers lie in one pair of arrays [L, B, T, K, H]; slot t of a row holds its position t, so a
token's slot needs no bookkeeping and rows of unequal length share a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.architectures import ModelConfig
from maxlm.models.layers.attention import KVCache
from maxlm.sharding import AxisRules, place

CACHE_AXES = ("layers", "batch", None, "kv_heads", None)


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype: Any, rules: AxisRules
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
    shape = config.cache_shape(batch, length)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    spec = place("cache", shape, CACHE_AXES, rules, sizes).spec
    return KVCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in KVCache._fields))
