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
from jax.typing import DTypeLike

from maxlm.parallel.decode_kernels import LocalProduct
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
from maxlm.parallel.operands import (
    KERNEL,
    DenseOperand,
    MapAxes,
    MapOperand,
    MatrixProduct,
    OperandArrays,
    PackedOperand,
)


class _MapLayouts:
    """Layouts of some maps of one input, and the specs that follow, read from the
    arguments' types. In ``Dims``, B and S come first."""

    def __init__(
        self,
        x: jax.Array,
        kernels: tuple[OperandArrays, ...],
        gathered_kernels: tuple[OperandArrays | None, ...],
        operands: tuple[MapOperand, ...],
        token_layout: Dims,
    ):
        self.x = get_layout(x)
        self.operands = operands
        self.stored = tuple(
            {name: get_layout(array) for name, array in kernel.items()}
            for kernel in kernels
        )
        self.tokens = token_layout
        self.num_inputs = len(self.x) - 2
        self.inputs = self.x[2:]
        self.input_shape = x.shape[2:]
        for operand in operands:
            inputs = operand.layout[: self.num_inputs]
            if inputs != self.inputs:
                raise ValueError(
                    f"x is split as {self.inputs}, the kernel's inputs as {inputs}"
                )
        self.outputs = tuple(operand.layout[self.num_inputs :] for operand in operands)
        self.product_tokens = tuple(map(_common_axes, self.x[:2], token_layout))
        """The tokens' layout during the product: the axes that x and the results
        share."""
        self.product_x = (*self.product_tokens, *self.inputs)
        output_axes = _flatten(chain.from_iterable(self.outputs))
        self.partial_axes = tuple(dict.fromkeys(output_axes))
        """The axes over which the gradient of x is a partial sum."""

        self.x_spec = make_spec(self.x)
        self.kernel_specs = tuple(
            {name: make_spec(layout) for name, layout in layouts.items()}
            for layouts in self.stored
        )
        self.gathered_specs = tuple(
            None if kernel is None else {KERNEL: make_spec(operand.layout)}
            for kernel, operand in zip(gathered_kernels, operands, strict=True)
        )
        self.result_specs = tuple(
            make_spec((*token_layout, *outputs)) for outputs in self.outputs
        )

    def get_axes(self, index: int) -> MapAxes:
        """Returns the mesh axes that split a map's arrays."""
        return MapAxes(
            tokens=_flatten(self.product_tokens),
            inputs=_flatten(self.inputs),
            outputs=_flatten(self.outputs[index]),
        )

    def gather_kernel(
        self, index: int, kernel: OperandArrays, gathered: OperandArrays | None
    ) -> OperandArrays:
        """Returns a kernel in use, on shards."""
        if gathered is not None:
            return gathered
        used = self.operands[index].array_layouts
        return {
            name: gather(array, self.stored[index][name], used[name])
            for name, array in kernel.items()
        }

    def multiply(self, index: int, x: jax.Array, kernel: OperandArrays) -> jax.Array:
        """Multiplies x [B, S, *inputs] by a kernel in use, on shards."""
        operand = self.operands[index]
        if isinstance(operand, DenseOperand):
            multiply = operand.product or multiply_by_xla
            return multiply(x, kernel[KERNEL], self.num_inputs)
        y = operand.product.multiply(_flatten_features(x), kernel, self.get_axes(index))
        outputs = _divide_shape(operand.output_sizes, self.outputs[index])
        return y.reshape(*y.shape[:2], *outputs)

    def multiply_transposed(
        self, index: int, d_y: jax.Array, kernel: OperandArrays
    ) -> jax.Array:
        """Multiplies d_y [B, S, *outputs] by a kernel's transpose, on shards."""
        operand = self.operands[index]
        if isinstance(operand, DenseOperand):
            return _multiply_transposed(d_y, kernel[KERNEL], self.num_inputs)
        flat_d_y = _flatten_features(d_y)
        axes = self.get_axes(index)
        d_x = operand.product.multiply_transposed(flat_d_y, kernel, axes)
        inputs = _divide_shape(self.input_shape, self.inputs)
        return d_x.reshape(*d_x.shape[:2], *inputs)

    def compute_gradient(
        self, index: int, x: jax.Array, d_y: jax.Array
    ) -> OperandArrays | None:
        """Computes the gradient of a kernel's arrays, summed over this device's tokens;
        None: they have none."""
        operand = self.operands[index]
        if not operand.is_trained:
            return None
        if isinstance(operand, DenseOperand):
            return {KERNEL: _outer_product(x, d_y)}
        axes = self.get_axes(index)
        flat_x = _flatten_features(x)
        return operand.product.compute_gradient(flat_x, _flatten_features(d_y), axes)

    def reduce_gradient(
        self, index: int, gradient: OperandArrays | None
    ) -> OperandArrays | None:
        """Sums a kernel's gradient over devices, into its storage layout."""
        if gradient is None:
            return None
        summed_axes = _flatten(self.product_tokens)
        used = self.operands[index].array_layouts
        return {
            name: reduce(array, summed_axes, used[name], self.stored[index][name])
            for name, array in gradient.items()
        }


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def multiply_kernels(
    x: jax.Array,
    kernels: tuple[OperandArrays, ...],
    gathered_kernels: tuple[OperandArrays | None, ...],
    operands: tuple[MapOperand, ...],
    token_layout: Dims,
) -> tuple[jax.Array, ...]:
    """Returns ``x · kernel`` for every kernel; reverse-mode differentiable.

    Args:
        x: [B, S, *inputs].
        kernels: of each the arrays in their storage layouts: [*inputs, *outputs] in
            x's dtype, or those of a packed one.
        gathered_kernels: those of dense ones that need not be gathered, else None;
            gradients go to ``kernels``.
        operands: what each kernel is.
        token_layout: the mesh axes of B and S in the results.

    Returns:
        One [B, S, *outputs] a kernel, its outputs split as the kernel's are in use.
    """
    layouts = _MapLayouts(x, kernels, gathered_kernels, operands, token_layout)

    def local(x, kernels, gathered_kernels):
        x = gather(x, layouts.x, layouts.product_x)
        summed_axes = _flatten(layouts.inputs)
        ys = []
        for index, outputs in enumerate(layouts.outputs):
            kernel = layouts.gather_kernel(
                index, kernels[index], gathered_kernels[index]
            )
            y = layouts.multiply(index, x, kernel)
            product_layout = (*layouts.product_tokens, *outputs)
            result_layout = (*layouts.tokens, *outputs)
            ys.append(reduce(y, summed_axes, product_layout, result_layout))
        return tuple(ys)

    specs = layouts.x_spec, layouts.kernel_specs, layouts.gathered_specs
    run = map_shards(local, specs, layouts.result_specs)
    return run(x, kernels, gathered_kernels)


def _multiply_forward(x, kernels, gathered_kernels, operands, token_layout):
    ys = multiply_kernels(x, kernels, gathered_kernels, operands, token_layout)
    return ys, (x, kernels, gathered_kernels)


def _multiply_backward(operands, token_layout, saved, d_ys):
    x, kernels, gathered_kernels = saved
    layouts = _MapLayouts(x, kernels, gathered_kernels, operands, token_layout)

    # Left alone, a compiler puts off what nothing waits for, the kernels' gradients,
    # and holds every d_y until then. Where these are wider than x, one kernel follows
    # the other, and d_x waits for both; what a gradient then has to travel may still be
    # put off under other work.
    is_wide = sum(d_y.size for d_y in d_ys) > x.size

    def in_order(*arrays):
        return lax.optimization_barrier(arrays) if is_wide else arrays

    def local(x, kernels, gathered_kernels, d_ys):
        x = gather(x, layouts.x, layouts.product_x)
        d_x = jnp.zeros((), x.dtype)
        gradients = []
        for index, outputs in enumerate(layouts.outputs):
            result_layout = (*layouts.tokens, *outputs)
            product_layout = (*layouts.product_tokens, *outputs)
            d_y = gather(d_ys[index], result_layout, product_layout)
            kernel = layouts.gather_kernel(
                index, kernels[index], gathered_kernels[index]
            )
            d_x_term = layouts.multiply_transposed(index, d_y, kernel)
            # A kernel that is whole where its siblings are split gives its whole term
            # on every device, and the sum over these axes would count it as often.
            own_axes = _flatten(outputs)
            copies = axis_size(
                [axis for axis in layouts.partial_axes if axis not in own_axes]
            )
            if copies > 1:
                d_x_term = d_x_term / copies
            d_x, d_y = in_order(d_x + d_x_term, d_y)
            gradient = layouts.compute_gradient(index, x, d_y)
            d_x, d_ys, gradient = in_order(d_x, d_ys, gradient)
            gradients.append(gradient)
        d_kernels = tuple(
            layouts.reduce_gradient(index, gradient)
            for index, gradient in enumerate(gradients)
        )
        d_x = reduce(d_x, layouts.partial_axes, layouts.product_x, layouts.x)
        return d_x, d_kernels

    # Kernels without a gradient have no place in the results.
    gradient_specs = tuple(
        specs if operand.is_trained else None
        for operand, specs in zip(operands, layouts.kernel_specs, strict=True)
    )
    arguments = layouts.x_spec, layouts.kernel_specs
    specs = (*arguments, layouts.gathered_specs, layouts.result_specs)
    run = map_shards(local, specs, (layouts.x_spec, gradient_specs))
    d_x, d_kernels = run(x, kernels, gathered_kernels, d_ys)
    return d_x, d_kernels, None


multiply_kernels.defvjp(_multiply_forward, _multiply_backward)


def multiply_fused_kernel(
    x: jax.Array,
    kernel: jax.Array | OperandArrays,
    output_shapes: tuple[tuple[int, ...], ...],
    output_layouts: tuple[Dims, ...],
    *,
    product: LocalProduct | None = None,
    packed_product: MatrixProduct | None = None,
) -> tuple[jax.Array, ...]:
    """Returns ``x · kernel`` for kernels that lie side by side; without gradient.

    Args:
        x: [B, S, in], whole but for B.
        kernel: [in, outputs of all kernels]: of each device those columns of each, in
            order, that are its own (:func:`fuse_kernels`); or the arrays of packed
            ones.
        output_shapes, output_layouts: of each kernel, and the mesh axes that split it.
        product: on shards; None: XLA's dot.
        packed_product: of packed kernels.
    """
    multiply = product or multiply_by_xla
    tokens = get_layout(x)[:2]
    local_shapes = [
        _divide_shape(shape, layout)
        for shape, layout in zip(output_shapes, output_layouts, strict=True)
    ]
    ends = tuple(accumulate(prod(shape) for shape in local_shapes))
    output_axes = _flatten(chain.from_iterable(output_layouts))
    axes = MapAxes(_flatten(tokens), (), tuple(dict.fromkeys(output_axes)))

    def local(x: jax.Array, kernel: Any) -> tuple[jax.Array, ...]:
        if packed_product is None:
            y = multiply(x, kernel, 1)
        else:
            y = packed_product.multiply(x, kernel, axes)
        parts = jnp.split(y, ends[:-1], axis=-1)
        return tuple(
            part.reshape(*part.shape[:-1], *shape)
            for part, shape in zip(parts, local_shapes, strict=True)
        )

    kernel_specs = jax.tree.map(lambda x: make_spec(get_layout(x)), kernel)
    specs = make_spec((*tokens, ())), kernel_specs
    results = tuple(make_spec((*tokens, *layout)) for layout in output_layouts)
    return map_shards(local, specs, results)(x, kernel)


def multiply_head(
    hidden: jax.Array,
    head: jax.Array,
    spec: PartitionSpec,
    dtype: DTypeLike,
    *,
    product: LocalProduct | None = None,
    column_major: bool = False,
) -> jax.Array:
    """Returns ``hidden · head`` [B, S, V] in ``dtype`` and laid out as ``spec``.

    Args:
        hidden: [B, S, D].
        head: [D, V] in its layout in use; ``column_major``: the transpose of a table.
        product: on shards, without gradient; None: XLA's dot.
    """
    if product is None:
        return jnp.einsum(
            "bsd,dv->bsv", hidden, head, preferred_element_type=dtype, out_sharding=spec
        )
    batch, seq, vocab = parse_spec(spec, 3)
    hidden_spec = make_spec((batch, seq, ()))
    head_spec = make_spec(((), vocab))

    def local(hidden, head):
        return product(hidden, head, 1, dtype, column_major=column_major)

    run = map_shards(local, (hidden_spec, head_spec), spec)
    return run(reshard(hidden, hidden_spec), reshard(head, head_spec))


def multiply_packed_head(
    hidden: jax.Array,
    arrays: OperandArrays,
    operand: PackedOperand,
    spec: PartitionSpec,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns ``hidden · head`` as :func:`multiply_head` does, for a packed head;
    without gradient."""
    batch, seq, vocab = parse_spec(spec, 3)
    hidden_spec = make_spec((batch, seq, ()))
    stored = {name: get_layout(array) for name, array in arrays.items()}
    used = operand.array_layouts
    axes = MapAxes(_flatten((batch, seq)), (), vocab)

    def local(hidden: jax.Array, arrays: OperandArrays) -> jax.Array:
        whole = {
            name: gather(array, stored[name], used[name])
            for name, array in arrays.items()
        }
        return operand.product.multiply(hidden, whole, axes, dtype)

    array_specs = {name: make_spec(layout) for name, layout in stored.items()}
    run = map_shards(local, (hidden_spec, array_specs), spec)
    return run(reshard(hidden, hidden_spec), dict(arrays))


def fuse_kernels(kernels: Sequence[jax.Array]) -> jax.Array:
    """Puts kernels [in, *outputs] side by side, as :func:`multiply_fused_kernel` reads
    them; all of them are split over the same axes, or over none."""
    layouts = [get_layout(kernel) for kernel in kernels]
    outputs = chain.from_iterable(layout[1:] for layout in layouts)
    output_axes = tuple(dict.fromkeys(_flatten(outputs)))

    def local(*kernels):
        flat = [kernel.reshape(len(kernel), -1) for kernel in kernels]
        return jnp.concatenate(flat, axis=1)

    specs = tuple(make_spec(layout) for layout in layouts)
    return map_shards(local, specs, make_spec(((), output_axes)))(*kernels)


def can_fuse_kernels(specs: Sequence[PartitionSpec]) -> bool:
    """Whether kernels of these layouts can lie side by side: their inputs are whole,
    and the outputs of all are split over the same axes."""
    layouts = [parse_spec(spec, len(spec)) for spec in specs]
    if any(inputs for inputs, *_ in layouts):
        return False
    output_axes = {_flatten(outputs) for _, *outputs in layouts}
    return len(output_axes) == 1


def multiply_by_xla(
    x: jax.Array,
    kernel: jax.Array,
    num_inputs: int,
    dtype: DTypeLike | None = None,
    *,
    column_major: bool = False,
) -> jax.Array:
    """Multiplies x [..., *inputs] by a kernel [*inputs, *outputs], by XLA's dot, which
    chooses its operands' layouts itself: the :class:`LocalProduct` of training."""
    x_inputs = tuple(range(x.ndim - num_inputs, x.ndim))
    kernel_inputs = tuple(range(num_inputs))
    dims = ((x_inputs, kernel_inputs), ((), ()))
    return lax.dot_general(x, kernel, dims, preferred_element_type=dtype)


def _multiply_transposed(
    d_y: jax.Array, kernel: jax.Array, num_inputs: int
) -> jax.Array:
    """dy·kernelᵀ [B, S, *inputs]."""
    d_y_outputs = tuple(range(2, d_y.ndim))
    kernel_outputs = tuple(range(num_inputs, kernel.ndim))
    return lax.dot_general(d_y, kernel, ((d_y_outputs, kernel_outputs), ((), ())))


def _outer_product(x: jax.Array, d_y: jax.Array) -> jax.Array:
    """xᵀ·dy or (dyᵀ·x)ᵀ, [*inputs, *outputs]: whichever turns the smaller of the two
    around. JAX's own rule always turns dy, which on a CPU is slow where dy is the wide
    hidden layer of an MLP (benchmarks/README.md)."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    if prod(x.shape) <= prod(d_y.shape):
        return lax.dot_general(x, d_y, tokens)
    transposed = lax.dot_general(d_y, x, tokens)
    num_outputs = d_y.ndim - 2
    inputs = range(num_outputs, transposed.ndim)
    return transposed.transpose((*inputs, *range(num_outputs)))


def _flatten_features(x: jax.Array) -> jax.Array:
    """[B, S, ...] with all dimensions behind the first two as one."""
    return x.reshape(*x.shape[:2], -1)


def _divide_shape(shape: Sequence[int], layout: Sequence[Axes]) -> tuple[int, ...]:
    """The sizes of a device's part."""
    sizes = zip(shape, layout, strict=True)
    return tuple(size // axis_size(axes) for size, axes in sizes)


def _common_axes(a: Axes, b: Axes) -> Axes:
    """The longest beginning of both."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return tuple(axis for axis, _ in same)


def _flatten(layouts: Iterable[Axes]) -> Axes:
    """The mesh axes of all dimensions, in order."""
    return tuple(chain.from_iterable(layouts))
