"""Products on a CPU: of few rows, as decoding has, in the time of reading the model's
kernels, of many by its matrix units, where it has such (Intel's AMX)."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.cpu import load_kernels

__all__ = ["can_multiply_rows", "cpu_matmul"]

# Up to so many rows it is faster than XLA: of a transposed kernel, and without matrix
# units.
_MAX_COLUMN_MAJOR_ROWS, _MAX_ROWS = 16, 48


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def cpu_matmul(
    x: jax.Array, kernel: jax.Array, column_major: bool = False
) -> jax.Array:
    """Multiplies rows where :func:`can_multiply_rows`; its derivatives are XLA's
    products.

    Args:
        x: fp32 [R, inputs].
        kernel: fp32 [inputs, outputs].
        column_major: that kernel lies in memory with its inputs side by side, as the
            transpose of an array does; otherwise it would be copied.

    Returns:
        fp32 [R, outputs], off by 2e-7 (max |x| Σ |kernel| + Σ |x| max |kernel|) at
        most, of a row's and a column's inputs; up to 48 rows are the same bit for bit
        however many there are, and so are more.
    """
    multiply = jax.ffi.ffi_call(
        "pallas_kernels.CpuMatmul",
        jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.float32),
        vmap_method="sequential",
    )
    # XLA removes two transposes.
    return multiply(x, kernel.T if column_major else kernel, column_major=column_major)


@cpu_matmul.defjvp
def _differentiate(column_major, primals, tangents):
    (x, kernel), (d_x, d_kernel) = primals, tangents
    y = cpu_matmul(x, kernel, column_major)
    return y, d_x @ kernel + x @ d_kernel


def can_multiply_rows(
    x: jax.Array, kernel: jax.Array, *, column_major: bool = False
) -> bool:
    """Whether :func:`cpu_matmul` takes these operands and is the faster way on a
    CPU."""
    if not x.dtype == kernel.dtype == jnp.float32 or not (library := load_kernels()):
        return False
    if column_major:
        return len(x) <= _MAX_COLUMN_MAJOR_ROWS
    return len(x) <= _MAX_ROWS or bool(library.HasMatrixUnits())
