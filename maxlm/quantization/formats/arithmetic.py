"""Arithmetic whose results are the same under ``jax.jit`` as without, and as in other
libraries."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

SMALLEST_NORMAL = 2.0**-126
"""fp32. A smaller divisor may count as zero: XLA flushes denormal numbers."""


def divide_exactly(values: jax.Array, divisors: ArrayLike) -> jax.Array:
    """Returns fp32 values / divisors, each quotient rounded once where the device's
    division is; divisors are positive and broadcast against the values."""
    # XLA makes a division by a constant or a broadcast value a product with its
    # reciprocal, which rounds twice. It cannot tell that this maximum is the divisor.
    return values / jnp.maximum(divisors, -jnp.abs(values))


def look_up_codes(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """Returns the fp32 entries of a table of 2^b that codes 0 .. 2^b - 1 name.

    Selects, which fuse with what follows: a gather of single numbers is slow on TPUs.
    """
    entries = [jnp.float32(entry) for entry in table]
    bit = 0
    while len(entries) > 1:
        is_odd = (codes >> bit) & 1 == 1
        pairs = zip(entries[::2], entries[1::2], strict=True)
        entries = [jnp.where(is_odd, odd, even) for even, odd in pairs]
        bit += 1
    return entries[0]


def count_below(values: jax.Array, bounds: np.ndarray) -> jax.Array:
    """Returns uint8: how many of a few fp32 bounds are less than each value."""
    below = jnp.zeros(values.shape, jnp.uint8)
    for bound in bounds:
        below += (values > bound).astype(jnp.uint8)
    return below
