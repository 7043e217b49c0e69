"""The key-value cache: what a decoder keeps of the tokens it has seen, allocated once.

The layers of a stack lie in one pair of arrays [L, B, T, K, H]; slot t of a row holds its position
t, so a token's slot needs no bookkeeping and rows of unequal length share a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.attention import Cache, KVCache
from maxlm.sharding import AxisRules, resolve_placement

CACHE_AXES = ("layers", "batch", None, "kv_heads", None)


def init_cache(
    config: TransformerConfig, batch: int, length: int, dtype: Any, rules: AxisRules
) -> Cache:
    """An empty cache, created in its compute layout on the current mesh; pure, also under jit.

    Args:
        batch: rows B; a multiple of the devices that ``rules.batch`` splits them over.
        length: slots T of each row.
        dtype: the model's compute dtype.
        rules: compute layout, as the model's own.

    Raises:
        MaxlmError: rows or kv heads that do not divide over their mesh axes.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if config.attention.latent is not None:  # one vector for all heads
        rules = rules.model_copy(update={"kv_heads": ()})

    def empty(shape: tuple[int, ...]) -> jax.Array:
        spec = resolve_placement("cache", shape, CACHE_AXES, rules, sizes).spec
        return jnp.zeros(shape, dtype, out_sharding=spec)

    shapes = config.cache_shapes(batch, length)
    return {part: KVCache(*map(empty, pair)) for part, pair in shapes.items()}
