"""Memory of generation: the caches of a decoder's layers, as each mixer lays out its own."""

from math import prod

import jax
import jax.numpy as jnp

from maxlm.models.architectures import Decoder


def count_cache_bytes(model: Decoder, batch: int, length: int) -> int:
    """Counts the bytes of all layers' caches on all devices together.

    Args:
        batch: rows.
        length: tokens of each row.
    """
    total = 0
    for layers, kinds in model.cache_specs(batch, length).values():
        for array in jax.tree.leaves(kinds):
            total += layers * prod(array.shape) * jnp.dtype(array.dtype or model.dtype).itemsize
    return total
