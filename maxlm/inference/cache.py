"""Caches of a decoder's layers, allocated once; what is in them is the mixers' own affair."""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.architectures.transformer import Cache, Transformer
from maxlm.models.caches import CacheArray
from maxlm.sharding import resolve_placement


def init_cache(model: Transformer, batch: int, length: int) -> Cache:
    """Empty caches, created in their compute layout on the current mesh; pure, also under jit.

    Args:
        batch: rows B; a multiple of the devices that ``rules.batch`` splits them over.
        length: tokens T of each row.

    Raises:
        MaxlmError: rows or kv heads that do not divide over their mesh axes.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def allocate(layers: int, array: CacheArray) -> jax.Array:
        shape, axes = (layers, *array.shape), ("layers", *array.axes)
        spec = resolve_placement("cache", shape, axes, model.rules, sizes).spec
        return jnp.zeros(shape, array.dtype or model.dtype, out_sharding=spec)

    def fill(layers: int, spec: Any) -> Any:
        return jax.tree.map(lambda array: allocate(layers, array), spec)

    specs = model.cache_specs(batch, length)
    return {name: tuple(fill(layers, one) for one in own) for name, (layers, own) in specs.items()}
