"""Products of rows sorted by group, each group with a kernel of its own: a mixture of
experts without dropped tokens (Gale et al. 2022, MegaBlocks, §5). Their work follows
the rows there are.

:func:`grouped_matmul` and :func:`grouped_outer_product` are each other's gradients, to
any order.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

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
    dtype: DTypeLike | None = None,
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
    if kernels.ndim != 3 or rows.ndim != 2:
        _refuse_shapes(rows=rows, kernels=kernels, sizes=group_sizes)
    G, D, F = kernels.shape
    if transpose_kernels:
        D, F = F, D
    if rows.shape[1] != D or group_sizes.shape != (G,):
        _refuse_shapes(rows=rows, kernels=kernels, sizes=group_sizes)
    _check_scales(row_scales, rows, (len(rows),))
    _check_scales(column_scales, kernels, (G, F))
    call = _make_call(
        rows,
        kernels,
        group_sizes,
        dtype=dtype,
        backend=backend,
        is_scaled=row_scales is not None or column_scales is not None,
        transpose_kernels=transpose_kernels,
    )
    scales = row_scales, column_scales
    return _multiply(rows, kernels, group_sizes, scales, "matmul", call)


def grouped_outer_product(
    rows: jax.Array,
    others: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: DTypeLike | None = None,
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
    call = _make_call(rows, others, group_sizes, dtype=dtype, backend=backend)
    return _multiply(rows, others, group_sizes, (), "outer", call)


def _refuse_shapes(**arrays: jax.Array) -> NoReturn:
    shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
    raise ValueError(f"{shapes} do not belong together")


def _check_scales(
    scales: jax.Array | None, operand: jax.Array, shape: tuple[int, ...]
) -> None:
    if scales is None:
        return
    if scales.shape != shape or operand.dtype not in _EIGHT_BITS:
        raise ValueError(
            f"scales {scales.shape} of {operand.dtype}: want {shape} of 8 bits"
        )


class _GroupedCall(NamedTuple):
    """Everything static about one call."""

    dtype: jnp.dtype
    backend: str | None
    """None: whichever JAX lowers for."""
    transpose_kernels: bool


def _make_call(
    left: jax.Array,
    right: jax.Array,
    sizes: jax.Array,
    *,
    dtype: DTypeLike | None,
    backend: str | None,
    is_scaled: bool = False,
    transpose_kernels: bool = False,
) -> _GroupedCall:
    """Checks dtypes and backend, and fills in what is left to choose."""
    allowed = (*_FLOATS, *_EIGHT_BITS)
    are_known = left.dtype in allowed and right.dtype in allowed
    # Floats may meet narrower numbers; int8 only itself.
    is_narrow = right.dtype in _EIGHT_BITS
    may_differ = is_narrow and left.dtype != jnp.int8
    if not are_known or (left.dtype != right.dtype and not may_differ):
        raise ValueError(f"no grouped product of {left.dtype} and {right.dtype}")
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes are int32, not {sizes.dtype}")
    if backend not in (None, *_MODULES):
        raise ValueError(f"backend '{backend}' is none of {', '.join(_MODULES)}")
    if dtype is None:
        if left.dtype not in _EIGHT_BITS:
            dtype = left.dtype
        elif left.dtype == right.dtype == jnp.int8 and not is_scaled:
            dtype = jnp.int32
        else:
            dtype = jnp.bfloat16
    if jnp.dtype(dtype) not in (*_FLOATS, jnp.dtype(jnp.int32)):
        raise ValueError(f"no result in {jnp.dtype(dtype).name}")
    if left.dtype == jnp.float64:
        # For checks against references; no kernel has it.
        backend = "cpu"
    backend = backend or get_mesh_platform()
    return _GroupedCall(jnp.dtype(dtype), backend, transpose_kernels)


def _run(name: str, call: _GroupedCall, *arrays: jax.Array | None) -> jax.Array:
    """Runs the function ``name`` of the backend's module, "matmul" or "outer"."""
    arrays = jax.tree.map(jnp.asarray, arrays)

    def get_function(backend: str) -> Callable[..., jax.Array]:
        # Pallas is slow to import.
        module = import_module(f"{__name__}.{_MODULES[backend]}")
        if name == "outer":
            return partial(module.outer, dtype=call.dtype)
        transposed = call.transpose_kernels
        return partial(module.matmul, transposed=transposed, dtype=call.dtype)

    if call.backend is not None:
        return get_function(call.backend)(*arrays)
    return lax.platform_dependent(
        *arrays,
        tpu=get_function("tpu"),
        cuda=get_function("gpu"),
        default=get_function("cpu"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _multiply(left, right, sizes, scales, name: str, call: _GroupedCall):
    return _run(name, call, left, right, sizes, *scales)


def _forward(left, right, sizes, scales, name, call):
    if left.dtype in _EIGHT_BITS or right.dtype in _EIGHT_BITS:
        raise ValueError(
            f"no gradient of products of {left.dtype} {left.shape} and {right.dtype} "
            f"{right.shape}"
        )
    return _multiply(left, right, sizes, scales, name, call), (left, right, sizes)


def _backward(name: str, call: _GroupedCall, saved, d_y):
    left, right, sizes = saved
    d_y = d_y.astype(left.dtype)
    call = call._replace(dtype=left.dtype)
    transposed = call.transpose_kernels

    def multiply(rows, kernels, transpose_kernels):
        matmul_call = call._replace(transpose_kernels=transpose_kernels)
        return _multiply(rows, kernels, sizes, (), "matmul", matmul_call)

    if name == "outer":
        # Of the sum of row ⊗ other: d_row = d_y · other, d_other = rowᵀ · d_y.
        d_rows = multiply(right, d_y, True)
        d_others = multiply(left, d_y, False)
        return d_rows, d_others, None, None
    # Of row · kernel: d_kernel is the sum of row ⊗ d_y, d_row = d_y · kernelᵀ.
    if transposed:
        d_kernels = _multiply(d_y, left, sizes, (), "outer", call)
    else:
        d_kernels = _multiply(left, d_y, sizes, (), "outer", call)
    d_rows = multiply(d_y, right, not transposed)
    return d_rows, d_kernels, None, None


_multiply.defvjp(_forward, _backward)
