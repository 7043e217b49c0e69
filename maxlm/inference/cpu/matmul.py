"""Products of few rows on a CPU, as decoding has, in the time of reading the kernel."""

from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.inference.cpu.library import MATMUL, load_library
from maxlm.parallel.linear import multiply_by_xla

MAX_ROWS = 48
"""Up to so many rows this is faster than XLA's library: more rows reuse what is read,
and arithmetic takes the time."""
MAX_COLUMN_MAJOR_ROWS = 16
"""Likewise of a kernel that is the transpose of an array."""


def multiply_few_rows(
    x: jax.Array,
    kernel: jax.Array,
    num_inputs: int,
    dtype: DTypeLike | None = None,
    *,
    column_major: bool = False,
) -> jax.Array:
    """Multiplies as :class:`~maxlm.parallel.decode_kernels.LocalProduct` says: by
    :func:`cpu_matmul` where it is the faster way, else by XLA."""
    tokens = x.shape[: x.ndim - num_inputs]
    outputs = kernel.shape[num_inputs:]
    num_rows = prod(tokens)
    if not _is_faster(x, kernel, num_rows, column_major):
        return multiply_by_xla(x, kernel, num_inputs, dtype)
    rows = x.reshape(num_rows, -1)
    columns = kernel.reshape(rows.shape[1], -1)
    y = cpu_matmul(rows, columns, column_major=column_major)
    return y.reshape(*tokens, *outputs)


def cpu_matmul(
    x: jax.Array, kernel: jax.Array, *, column_major: bool = False
) -> jax.Array:
    """Multiplies rows by the kernel in C++; not differentiable.

    Args:
        x: fp32 [R, inputs]; any number of rows, though many are slow.
        kernel: fp32 [inputs, outputs].
        column_major: that the kernel lies in memory with its inputs side by side, as
            the transpose of an array does; otherwise it would be copied.

    Returns:
        fp32 [R, outputs], off by 2e-7 (max |x| Σ |kernel| + Σ |x| max |kernel|) at
        most, of a row's and a column's inputs. A row is the same bit for bit however
        many there are.
    """
    multiply = jax.ffi.ffi_call(
        MATMUL,
        jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32),
        vmap_method="sequential",
    )
    # XLA removes a transpose of a transpose, so that the array is read as it lies.
    return multiply(x, kernel.T if column_major else kernel, column_major=column_major)


def _is_faster(
    x: jax.Array, kernel: jax.Array, num_rows: int, column_major: bool
) -> bool:
    """Whether :func:`cpu_matmul` takes these operands and beats XLA."""
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return False
    if num_rows > (MAX_COLUMN_MAJOR_ROWS if column_major else MAX_ROWS):
        return False
    return load_library() is not None
