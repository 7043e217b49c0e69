"""A number that tells whether an array is, bit for bit, what it was: computed on the devices that
hold it, the same for every layout.

Of the array's bits b_i as unsigned integers it is Σ b_i·w_i mod 2^32, w_i being an odd number mixed
from the element's place. A changed element always shows (an odd factor loses no bit of the
difference); elements that change places, or several changes at once, go unseen once in 2^32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.sharding import bind_mesh

# Odd constants of a multiplicative hash, one a dimension (Knuth's 2^32/φ and primes near it).
_FACTORS = (2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263, 374_761_393)
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def compute_fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns each array's fingerprint by name. All processes call it together; it waits for the
    arrays."""
    if not arrays:
        return {}
    mesh = next((m for x in arrays.values() if (m := getattr(x.sharding, "mesh", None))), None)
    compute = jax.jit(lambda arrays: {name: _fingerprint(array) for name, array in arrays.items()})
    values = (bind_mesh(mesh, compute) if mesh is not None else compute)(dict(arrays))
    return {name: int(value) for name, value in jax.device_get(values).items()}


def _fingerprint(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        bits: Any = array.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    sharding: Any = getattr(jax.typeof(array), "sharding", None)
    where = sharding if sharding is not None and not sharding.mesh.empty else None
    place = jnp.zeros_like(bits)
    for axis in range(array.ndim):
        along = lax.broadcasted_iota(jnp.uint32, array.shape, axis, out_sharding=where)
        place = place + along * jnp.uint32(_FACTORS[axis % len(_FACTORS)])
    place = (place ^ (place >> 16)) * jnp.uint32(_FACTORS[1])
    weight = (place ^ (place >> 13)) | jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)
