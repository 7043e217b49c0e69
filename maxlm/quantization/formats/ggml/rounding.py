"""Arithmetic that rounds after each operation, as C does on a machine without fused
multiply-add.

GGML's quantizers compare sums, and a last bit decides between two scales. XLA's
compilers contract a product and a sum into one instruction that rounds once, divide by
a constant by multiplying with its reciprocal, and sum in an order of their own; neither
``lax.optimization_barrier`` nor ``lax.reduce_precision`` keeps them from it. What does
is a number that they cannot know to be zero: the bits of a product, combined with it,
are no product to them any more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

# Terms of a sum that are compiled as one: a loop over these keeps XLA from computing a
# sum anew for everything that uses it.
_RUN = 16
# The bits of a NaN that no arithmetic gives.
_UNUSED_NAN = 0x7FC5A5A5
# 1.5 · 2^23: the sum of it and a number below 2^22 has the number's nearest integer, of
# two the even one, in its low bits.
_INTEGER_MAGIC = 12582912.0


@dataclass(frozen=True)
class SeparateRounding:
    """Operations of fp32 that round one by one.

    Args:
        zero: int32 zeros that a compiler cannot know, of a shape that broadcasts with
            the operands.
    """

    zero: jax.Array

    @classmethod
    def of(cls, values: jax.Array) -> "SeparateRounding":
        """Returns the operations on arrays that broadcast with these fp32 values."""
        bits = lax.bitcast_convert_type(values, jnp.int32)
        return cls(jnp.where(bits == _UNUSED_NAN, 1, 0))

    def seal(self, numbers: jax.Array | float) -> jax.Array:
        """Returns the same fp32 numbers, of which a compiler does not know how they
        came about: constants and quotients before another division."""
        bits = lax.bitcast_convert_type(jnp.float32(numbers), jnp.int32)
        return lax.bitcast_convert_type(bits ^ self.zero, jnp.float32)

    def multiply(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Returns the rounded product."""
        return self.seal(left * right)


def sum_in_order(
    list_terms: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns sums of what ``list_terms`` returns for the items of arrays [size, ...],
    from the first to the last; size is a multiple of 8."""
    items = [array[0] for array in arrays]
    shapes = jax.eval_shape(list_terms, *items)
    zeros = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes)

    def add_run(number: jax.Array, sums: tuple[jax.Array, ...]):
        runs = [
            lax.dynamic_slice_in_dim(array, number * _RUN, _RUN) for array in arrays
        ]
        for place in range(_RUN):
            terms = list_terms(*[run[place] for run in runs])
            sums = tuple(a + b for a, b in zip(sums, terms, strict=True))
        return sums

    return lax.fori_loop(0, len(arrays[0]) // _RUN, add_run, zeros)


def round_to_integer(numbers: jax.Array) -> jax.Array:
    """Returns the nearest int32, of two the even one, as ``nearest_int`` of
    ggml-quants.c has it: what is beyond ±2^22 becomes some number or other."""
    bits = lax.bitcast_convert_type(numbers + jnp.float32(_INTEGER_MAGIC), jnp.int32)
    return (bits & 0x007FFFFF) - 0x00400000


def find_signed_extreme(values: jax.Array) -> jax.Array:
    """Returns the number of the greatest magnitude over the first dimension, with its
    sign; of several the first; zero is positive."""
    extreme = jnp.zeros_like(values[0])
    for value in values:
        extreme = jnp.where(jnp.abs(value) > jnp.abs(extreme), value, extreme)
    return extreme
