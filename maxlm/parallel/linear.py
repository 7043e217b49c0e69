"""Linear maps on a mesh, with ZeRO-3, tensor and sequence parallelism in one program.

A map is ``y = x · kernel``; several that read the same x are done together, so that x
is gathered once and its gradient reduced once. What crosses the wire follows from three
layouts alone (how x lies, how a kernel is stored and how it is used, how y shall lie):

=======================  ==========================  ===============================
layouts differ in        forward                     backward
=======================  ==========================  ===============================
kernel: stored and used  all-gather the kernel       all-gather it, reduce-scatter
(ZeRO-3)                                             its gradient into storage
x split over more of     all-gather x                all-gather x, reduce-scatter
the sequence than y                                  its gradient
y split over more of it  reduce-scatter y            all-gather its gradient
kernel's inputs split    all-reduce y                nothing
kernel's outputs split   nothing                     all-reduce the gradient of x
=======================  ==========================  ===============================

Rows two and three with the last two turned into scatters are Megatron's sequence
parallelism (Korthikanti et al. 2022, §4.2.2).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, chain, takewhile
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from maxlm.parallel.local import (
    Axes,
    Dims,
    axis_size,
    gather,
    get_layout,
    make_spec,
    map_shards,
    parse_spec,
    reduce,
)
from pallas_kernels.chips import get_platform
from pallas_kernels.cpu_matmul import can_multiply_rows, cpu_matmul


class _Layouts:
    """Layouts of everything, and specs, from the arguments' types."""

    def __init__(self, x, kernels, wholes, used: tuple[Dims, ...], tokens: Dims):
        self.x, self.stored, self.used = (
            get_layout(x),
            tuple(map(get_layout, kernels)),
            used,
        )
        self.inputs = len(self.x) - 2
        for dims in used:
            if dims[: self.inputs] != self.x[2:]:
                raise ValueError(
                    f"x is split as {self.x[2:]}, the kernel's inputs as {dims}"
                )
        self.inner = tuple(map(_common, self.x[:2], tokens))
        """The tokens' layout during the product: the axes that x and the results
        share."""
        self.outputs = tuple(dims[self.inputs :] for dims in used)
        self.spread = tuple(dict.fromkeys(_flat(chain.from_iterable(self.outputs))))
        """The axes over which the gradient of x is a partial sum."""
        self.kernels = tuple(map(make_spec, self.stored))
        pairs = zip(wholes, used, strict=True)
        self.wholes = tuple(
            None if whole is None else make_spec(own) for whole, own in pairs
        )
        self.results = tuple(make_spec((*tokens, *own)) for own in self.outputs)

    def kernel(self, i: int, kernel: jax.Array, whole: jax.Array | None) -> jax.Array:
        """Returns a kernel in use, on shards."""
        return gather(kernel, self.stored[i], self.used[i]) if whole is None else whole


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def multiply_kernels(
    x: jax.Array,
    kernels: tuple[jax.Array, ...],
    gathered_kernels: tuple[jax.Array | None, ...],
    kernel_layouts: tuple[Dims, ...],
    token_layout: Dims,
) -> tuple[jax.Array, ...]:
    """Returns ``x · kernel`` for every kernel; reverse-mode differentiable.

    Args:
        x: [B, S, *inputs].
        kernels: each [*inputs, *outputs], in x's dtype and in its storage layout.
        gathered_kernels: where they need not be gathered, else None; gradients go to
            ``kernels``.
        kernel_layouts: mesh axes of each kernel's dimensions in use, which begin those
            in storage.
        token_layout: the mesh axes of B and S in the results.

    Returns:
        One [B, S, *outputs] a kernel, its outputs split as the kernel's are in use.
    """
    return _multiply(
        _contract_forward, x, kernels, gathered_kernels, kernel_layouts, token_layout
    )


def _multiply(contract, x, kernels, wholes, used, tokens):
    own = _Layouts(x, kernels, wholes, used, tokens)

    def local(x, kernels, wholes):
        x = gather(x, own.x, (*own.inner, *own.x[2:]))
        summed = _flat(own.x[2:])
        ys = []
        for i, pair in enumerate(zip(kernels, wholes, strict=True)):
            y = contract(x, own.kernel(i, *pair), own.inputs)
            outputs = own.outputs[i]
            ys.append(reduce(y, summed, (*own.inner, *outputs), (*tokens, *outputs)))
        return tuple(ys)

    specs = make_spec(own.x), own.kernels, own.wholes
    return map_shards(local, specs, own.results)(x, kernels, wholes)


def _forward(x, kernels, wholes, used, tokens):
    return _multiply(_contract, x, kernels, wholes, used, tokens), (x, kernels, wholes)


def _backward(used, tokens, saved, d_ys):
    x, kernels, wholes = saved
    own = _Layouts(x, kernels, wholes, used, tokens)

    # Left alone, a compiler puts off what nothing waits for, the kernels' gradients,
    # and holds every d_y until then. Where these are wider than x, one kernel follows
    # the other, and d_x waits for both; what a gradient then has to travel may still be
    # put off under other work.
    wide = sum(d_y.size for d_y in d_ys) > x.size

    def in_order(*arrays):
        return lax.optimization_barrier(arrays) if wide else arrays

    def local(x, kernels, wholes, d_ys):
        x = gather(x, own.x, (*own.inner, *own.x[2:]))
        d_x = jnp.zeros((), x.dtype)
        products = []
        for i, pair in enumerate(zip(kernels, wholes, strict=True)):
            outputs = own.outputs[i]
            d_y = gather(d_ys[i], (*tokens, *outputs), (*own.inner, *outputs))
            kernel = own.kernel(i, *pair)
            dims = tuple(range(2, d_y.ndim)), tuple(range(own.inputs, kernel.ndim))
            part = lax.dot_general(d_y, kernel, (dims, ((), ())))
            # A kernel that is whole where its siblings are split gives its whole share
            # everywhere.
            copies = axis_size(
                [axis for axis in own.spread if axis not in _flat(outputs)]
            )
            part = part / copies if copies > 1 else part
            d_x, d_y = in_order(d_x + part, d_y)
            d_x, d_ys, product = in_order(d_x, d_ys, _outer(x, d_y))
            products.append(product)
        d_kernels = tuple(
            reduce(product, _flat(own.inner), used[i], own.stored[i])
            for i, product in enumerate(products)
        )
        d_x = reduce(d_x, own.spread, (*own.inner, *own.x[2:]), own.x)
        return d_x, d_kernels

    results = make_spec(own.x), own.kernels
    specs = (*results, own.wholes, own.results)
    return (*map_shards(local, specs, results)(x, kernels, wholes, d_ys), None)


multiply_kernels.defvjp(_forward, _backward)


def multiply_fused_kernel(
    x: jax.Array,
    kernel: jax.Array,
    output_shapes: tuple[tuple[int, ...], ...],
    output_layouts: tuple[Dims, ...],
) -> tuple[jax.Array, ...]:
    """Returns ``x · kernel`` for kernels that lie side by side; without gradient.

    Args:
        x: [B, S, in], whole but for B.
        kernel: [in, outputs of all kernels]: of each device those columns of each, in
            order, that are its own (:func:`fuse_kernels`).
        output_shapes, output_layouts: of each kernel, and the mesh axes that split it.
    """
    tokens = get_layout(x)[:2]
    columns = get_layout(kernel)
    local_shapes = [
        tuple(size // axis_size(axes) for size, axes in zip(shape, layout, strict=True))
        for shape, layout in zip(output_shapes, output_layouts, strict=True)
    ]
    ends = tuple(accumulate(map(prod, local_shapes)))

    def local(x, kernel):
        y = jnp.split(_contract_forward(x, kernel, 1), ends[:-1], axis=-1)
        shapes = zip(y, local_shapes, strict=True)
        return tuple(part.reshape(*part.shape[:-1], *shape) for part, shape in shapes)

    specs = make_spec((*tokens, ())), make_spec(columns)
    return map_shards(
        local, specs, tuple(make_spec((*tokens, *own)) for own in output_layouts)
    )(x, kernel)


def multiply_head(
    hidden: jax.Array,
    head: jax.Array,
    spec: PartitionSpec,
    dtype: Any,
    *,
    column_major: bool,
) -> jax.Array:
    """Returns ``hidden · head`` [B, S, V] in ``dtype`` and laid out as ``spec``.

    Args:
        hidden: [B, S, D].
        head: [D, V] in its layout in use; ``column_major``: the transpose of a table.
    """
    if get_platform() != "cpu":
        return jnp.einsum(
            "bsd,dv->bsv", hidden, head, preferred_element_type=dtype, out_sharding=spec
        )
    own = partial(_contract_forward, inputs=1, dtype=dtype, column_major=column_major)
    specs = (
        make_spec((*parse_spec(spec, 3)[:2], ())),
        make_spec(((), parse_spec(spec, 3)[2])),
    )
    return map_shards(own, specs, spec)(
        reshard(hidden, specs[0]), reshard(head, specs[1])
    )


def fuse_kernels(kernels: Sequence[jax.Array]) -> jax.Array:
    """Puts kernels [in, *outputs] side by side, as :func:`multiply_fused_kernel` reads
    them; all of them are split over the same axes, or over none."""
    layouts = [get_layout(kernel) for kernel in kernels]
    split = tuple(dict.fromkeys(_flat(chain.from_iterable(own[1:] for own in layouts))))

    def local(*kernels):
        return jnp.concatenate([k.reshape(len(k), -1) for k in kernels], axis=1)

    return map_shards(local, tuple(map(make_spec, layouts)), make_spec(((), split)))(
        *kernels
    )


def can_fuse_kernels(specs: Sequence[PartitionSpec]) -> bool:
    """Whether kernels of these layouts can lie side by side: their inputs are whole,
    and the outputs of all are split over the same axes."""
    parsed = [parse_spec(spec, len(spec)) for spec in specs]
    split = {_flat(own[1:]) for own in parsed}
    return len(split) == 1 and not any(own[0] for own in parsed)


def _contract(x, kernel, inputs, dtype=None):
    last = tuple(range(x.ndim - inputs, x.ndim))
    dims = (last, tuple(range(inputs))), ((), ())
    return lax.dot_general(x, kernel, dims, preferred_element_type=dtype)


def _contract_forward(x, kernel, inputs, dtype=None, column_major=False):
    """Multiplies as :func:`_contract` does where no gradient is asked for; on a CPU by
    a kernel."""
    tokens, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    if get_platform() == "cpu":
        rows = x.reshape(prod(tokens), -1)
        columns = kernel.reshape(rows.shape[1], -1)
        if can_multiply_rows(rows, columns, column_major=column_major):
            return cpu_matmul(rows, columns, column_major).reshape(*tokens, *outputs)
    return _contract(x, kernel, inputs, dtype)


def _outer(x, d_y):
    """xᵀ·dy or (dyᵀ·x)ᵀ: whichever turns the smaller of the two around. JAX's own rule
    always turns dy, which on a CPU is slow where dy is the wide hidden layer of an MLP
    (benchmarks/README.md)."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    if prod(x.shape) <= prod(d_y.shape):
        return lax.dot_general(x, d_y, tokens)
    turned = lax.dot_general(d_y, x, tokens)
    outputs = d_y.ndim - 2
    return turned.transpose((*range(outputs, turned.ndim), *range(outputs)))


def _common(a: Axes, b: Axes) -> Axes:
    """The longest beginning of both."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return tuple(axis for axis, _ in same)


def _flat(dims: Iterable[Axes]) -> Axes:
    return tuple(chain.from_iterable(dims))
