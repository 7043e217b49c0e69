"""Products of rows sorted by group, each group with a kernel of its own: a mixture of
experts without dropped tokens (Gale et al. 2022, MegaBlocks, §5). Their work follows
the rows there are.

:func:`grouped_matmul` and :func:`grouped_outer_product` are each other's gradients, to
any order.
"""

from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import get_mesh_platform

__all__ = ["grouped_matmul", "grouped_outer_product"]

_MODULES = {"tpu": "tpu", "gpu": "triton", "cpu": "xla"}
_FLOATS = (jnp.bfloat16, jnp.float32, jnp.float64)
_EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def grouped_matmul(
    rows: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_kernels: bool = False,
    row_scales: jax.Array | None = None,
    column_scales: jax.Array | None = None,
    dtype: Any = None,
    backend: str | None = None,
) -> jax.Array:
    """Multiplies each row by its group's kernel: ``y[r] = rows[r] · kernels[g(r)]``.

    Args:
        rows: [R, D]; group g's follow those of the groups before it. Rows behind the
            last group's may hold anything, NaN too.
        kernels: [G, D, F], or [G, F, D] when transposed. Operands are bf16, fp32, int8
            or float8 (e4m3fn, e5m2), kernels perhaps narrower than rows; an 8-bit type
            that the chip does not multiply is widened in the kernel. fp32 has the
            precision that ``jax.default_matmul_precision`` says.
        group_sizes: int32 [G], rows of each group, which may be 0; their sum is at most
            R.
        row_scales, column_scales: fp32 [R] and [G, F], of 8-bit operands: what their
            elements are multiplied by, after the product.
        dtype: of the result. Default: the rows'; of int8 without scales int32, of other
            8-bit rows bf16.
        backend: the platform that the program is for, "tpu", "gpu" or "cpu". None: that
            of the current mesh's devices, without a mesh whichever JAX lowers for.

    Returns:
        [R, F], summed in fp32 (of integers in int32); zeros behind the last group.
        Reverse-mode differentiable in rows and kernels of 16 or 32 bits; padding rows
        get zeros.

    Raises:
        ValueError: shapes or types that do not belong together; sizes that no block
            fits.
    """
    G, D, F = (*kernels.shape, 0, 0, 0)[:3]
    D, F = (F, D) if transpose_kernels else (D, F)
    if (
        kernels.ndim != 3
        or rows.ndim != 2
        or rows.shape[1] != D
        or group_sizes.shape != (G,)
    ):
        _refuse_shapes(rows=rows, kernels=kernels, sizes=group_sizes)
    pairs = (row_scales, rows, (len(rows),)), (column_scales, kernels, (G, F))
    for scales, operand, shape in pairs:
        if scales is not None and (
            scales.shape != shape or operand.dtype not in _EIGHT_BITS
        ):
            raise ValueError(
                f"scales {scales.shape} of {operand.dtype}: want {shape} of 8 bits"
            )
    scaled = row_scales is not None or column_scales is not None
    how = _how(rows, kernels, group_sizes, dtype, scaled, backend, transpose_kernels)
    return _multiply(
        rows, kernels, group_sizes, (row_scales, column_scales), "matmul", how
    )


def grouped_outer_product(
    rows: jax.Array,
    others: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any = None,
    backend: str | None = None,
) -> jax.Array:
    """Sums row ⊗ other over the rows of each group: the gradient of its kernel.

    Args:
        rows, others: [R, D] and [R, F], sorted by group; behind the last one they may
            hold anything.
        The others: as for :func:`grouped_matmul`.

    Returns:
        [G, D, F], summed in fp32 (of int8 in int32); zeros of an empty group.
    """
    if (
        rows.ndim != 2
        or others.ndim != 2
        or len(rows) != len(others)
        or group_sizes.ndim != 1
    ):
        _refuse_shapes(rows=rows, others=others, sizes=group_sizes)
    how = _how(rows, others, group_sizes, dtype, False, backend)
    return _multiply(rows, others, group_sizes, (), "outer", how)


def _refuse_shapes(**arrays: jax.Array) -> None:
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    raise ValueError(f"{shapes} do not belong together")


class _How(NamedTuple):
    """Everything static."""

    dtype: Any
    backend: str | None
    transposed: bool


def _how(left, right, sizes, dtype, scaled, backend, transposed=False) -> _How:
    allowed = (*_FLOATS, *_EIGHT_BITS)
    narrow = right.dtype in _EIGHT_BITS
    mixed = left.dtype != right.dtype and (not narrow or left.dtype == jnp.int8)
    if left.dtype not in allowed or right.dtype not in allowed or mixed:
        raise ValueError(f"no grouped product of {left.dtype} and {right.dtype}")
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes are int32, not {sizes.dtype}")
    if backend not in (None, *_MODULES):
        raise ValueError(f"backend '{backend}' is none of {', '.join(_MODULES)}")
    if dtype is None:
        integers = left.dtype == right.dtype == jnp.int8 and not scaled
        narrow = jnp.int32 if integers else jnp.bfloat16
        dtype = narrow if left.dtype in _EIGHT_BITS else left.dtype
    if jnp.dtype(dtype) not in (*_FLOATS, jnp.dtype(jnp.int32)):
        raise ValueError(f"no result in {jnp.dtype(dtype).name}")
    if left.dtype == jnp.float64:
        backend = "cpu"  # for checks against references; no kernel has it
    return _How(jnp.dtype(dtype), backend or get_mesh_platform(), transposed)


def _run(name: str, how: _How, *arrays: Any) -> jax.Array:
    options: dict[str, Any] = {"dtype": how.dtype}
    arrays = jax.tree.map(jnp.asarray, arrays)
    if name == "matmul":
        options["transposed"] = how.transposed

    def of(backend: str):
        module = import_module(
            f"{__name__}.{_MODULES[backend]}"
        )  # Pallas is slow to import.
        return partial(getattr(module, name), **options)

    if how.backend is not None:
        return of(how.backend)(*arrays)
    return lax.platform_dependent(
        *arrays, tpu=of("tpu"), cuda=of("gpu"), default=of("cpu")
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _multiply(left, right, sizes, scales, name: str, how: _How):
    return _run(name, how, left, right, sizes, *scales)


def _forward(left, right, sizes, scales, name, how):
    if left.dtype in _EIGHT_BITS or right.dtype in _EIGHT_BITS:
        raise ValueError(
            f"no gradient of products of {left.dtype} {left.shape} and {right.dtype} "
            f"{right.shape}"
        )
    return _multiply(left, right, sizes, scales, name, how), (left, right, sizes)


def _backward(name: str, how: _How, saved, d_y):
    left, right, sizes = saved
    d_y, how, transposed = (
        d_y.astype(left.dtype),
        how._replace(dtype=left.dtype),
        how.transposed,
    )

    def multiply(rows, kernels, transposed):
        own = how._replace(transposed=transposed)
        return _multiply(rows, kernels, sizes, (), "matmul", own)

    if name == "outer":
        return multiply(right, d_y, True), multiply(left, d_y, False), None, None
    pair = (d_y, left) if transposed else (left, d_y)
    d_kernels = _multiply(*pair, sizes, (), "outer", how)
    return multiply(d_y, right, not transposed), d_kernels, None, None


_multiply.defvjp(_forward, _backward)
