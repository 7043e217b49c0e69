"""The linear map and the table that every other layer is made of."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import jax
from flax import nnx
from jax.typing import DTypeLike

from maxlm.models.build_context import BuildContext
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.params import (
    FusedKernel,
    Initializer,
    Leaf,
    ModuleT,
    ParamReader,
    declare,
    get_base,
    get_spec,
    materialize,
    truncated_normal,
)
from maxlm.parallel.batch_invariance import multiply_in_tiles
from maxlm.parallel.decode_kernels import LocalProduct
from maxlm.parallel.embedding import embed_tokens
from maxlm.parallel.local import get_layout, parse_spec

StoredParam = jax.Array | Leaf
"""A parameter as it is stored: one array, or a leaf that holds several."""


class Linear(nnx.Module):
    """``y = x · kernel + bias`` over named axes, e.g. embed → (heads, head_dim).

    Args:
        inputs, outputs: logical axis (or None) → size, in order; the kernel's shape is
            their concatenation.
        std: standard deviation of the truncated normal initialiser; None: the
            context's ``init_std``.
        initializer: another one in its place.
        role: "matrix" for hidden layers, "table" for an output head.
    """

    def __init__(
        self,
        inputs: Mapping[str, int] | Mapping[None, int],
        outputs: Mapping[str, int] | Mapping[None, int],
        context: BuildContext,
        *,
        bias: bool,
        std: float | None = None,
        initializer: Initializer | None = None,
        role: Literal["matrix", "table"] = "matrix",
    ):
        self.rules = context.rules
        self.dtype = context.dtype
        self.product = choose_product(context)
        """See :func:`set_product`; None: XLA's dot."""
        if initializer is None:
            initializer = truncated_normal(context.init_std if std is None else std)
        self.kernel = declare(
            (*inputs.values(), *outputs.values()),
            (*inputs, *outputs),
            initializer,
            role,
            contracting_dims=tuple(range(len(inputs))),
        )
        self.bias = (
            declare(
                tuple(outputs.values()),
                tuple(outputs),
                jax.nn.initializers.zeros,
                "vector",
            )
            if bias
            else None
        )

    def __call__(self, x: jax.Array, *, seq_axis: str | None = "seq") -> jax.Array:
        """x [B, S, *inputs] → [B, S, *outputs] in the compute dtype; see
        :func:`project`."""
        return project(x, self, seq_axis=seq_axis)[0]


def project(
    x: jax.Array, *layers: Linear, seq_axis: str | None = "seq"
) -> tuple[jax.Array, ...]:
    """Applies several maps to one input [B, S, *inputs], which then crosses the wire
    once. ``seq_axis``: the logical axis of the results' sequence: "seq" within a layer,
    "residual" for what is added to the residual stream; None: it is whole (a frontend's
    items)."""
    rules = layers[0].rules
    dtype = layers[0].dtype
    token_layout = parse_spec(rules.spec("batch", seq_axis), 2)
    readers = [
        ParamReader(get_spec(layer.kernel), rules, dtype, token_layout, layer.product)
        for layer in layers
    ]
    kernels: list[StoredParam] = [layer.kernel.get_value() for layer in layers]
    products = _multiply(x.astype(dtype), readers, kernels)

    outputs = []
    for layer, y in zip(layers, products, strict=True):
        if layer.bias is not None:
            y = y + materialize(layer.bias, rules, dtype)
        outputs.append(y)
    # Adapters see an output with its bias.
    return tuple(
        kernel.finish_output(y, reader) if isinstance(kernel, Leaf) else y
        for y, reader, kernel in zip(outputs, readers, kernels, strict=True)
    )


def _multiply(
    x: jax.Array, readers: list[ParamReader], kernels: list[StoredParam]
) -> list[jax.Array]:
    """Multiplies x by stored kernels; in one program, where none changes its input."""
    fused = get_base(kernels[0])
    if isinstance(fused, FusedKernel):
        products = fused.multiply(x, readers)
        return _finish_products(products, x, readers, kernels)

    inputs = [
        _prepare_input(x, reader, kernel)
        for reader, kernel in zip(readers, kernels, strict=True)
    ]
    weights = [
        reader.read_kernel(kernel)
        for reader, kernel in zip(readers, kernels, strict=True)
    ]
    if all(prepared is x for prepared in inputs):
        products = readers[0].multiply(x, *weights)
        return _finish_products(products, x, readers, kernels)

    finished = []
    for prepared, weight, reader, kernel in zip(
        inputs, weights, readers, kernels, strict=True
    ):
        (y,) = reader.multiply(prepared, weight)
        finished.append(_finish_product(y, prepared, reader, kernel))
    return finished


def _prepare_input(x: jax.Array, reader: ParamReader, kernel: StoredParam) -> jax.Array:
    return kernel.prepare_input(x, reader) if isinstance(kernel, Leaf) else x


def _finish_product(
    y: jax.Array, x: jax.Array, reader: ParamReader, kernel: StoredParam
) -> jax.Array:
    return kernel.finish_product(y, x, reader) if isinstance(kernel, Leaf) else y


def _finish_products(
    products: tuple[jax.Array, ...],
    x: jax.Array,
    readers: list[ParamReader],
    kernels: list[StoredParam],
) -> list[jax.Array]:
    return [
        _finish_product(y, x, reader, kernel)
        for y, reader, kernel in zip(products, readers, kernels, strict=True)
    ]


class Embedding(nnx.Module):
    """A table [size, D]; indices outside it give NaN rather than a wrong row.

    Args:
        axis: logical axis of the rows, or None.
        width: of a row; None: D, that of the residual stream.
    """

    def __init__(
        self,
        axis: str | None,
        size: int,
        context: BuildContext,
        *,
        width: int | None = None,
    ):
        self.rules = context.rules
        self.dtype = context.dtype
        self.product = choose_product(context)
        """Of a head that is tied to the table; see :func:`set_product`."""
        self.table = declare(
            (size, width or context.d_model),
            (axis, "embed"),
            truncated_normal(context.init_std),
            "table",
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [..., S] → [..., S, D] in the compute dtype, for the residual
        stream."""
        reader = ParamReader(
            get_spec(self.table), self.rules, accumulation_dtype(self.dtype)
        )
        token_layout = (*get_layout(ids)[:-1], self.rules.residual)

        def read_rows(
            param: StoredParam,
            axes: tuple[str | None, ...] = (),
            dtype: DTypeLike | None = None,
        ) -> jax.Array:
            row_dtype = self.dtype
            row_reader = reader
            if dtype is not None:
                row_dtype = dtype
                row_reader = replace(reader, dtype=dtype)
            table = row_reader.read(param, axes)
            column_axis = (axes or reader.spec.axes)[-1]
            out_layout = (*token_layout, self.rules.mesh_axes(column_axis))
            return embed_tokens(
                table.value, ids, table.compute_layout, out_layout, row_dtype
            )

        table = self.table.get_value()
        if isinstance(table, Leaf):
            return table.look_up(read_rows, reader)
        return read_rows(table)


def choose_product(context: BuildContext) -> LocalProduct | None:
    """Returns what linear maps multiply with in training; None: XLA's dot."""
    return multiply_in_tiles if context.parallel.batch_invariant else None


def set_product(module: ModuleT, product: LocalProduct) -> ModuleT:
    """Returns the module with another product in its linear maps, and in a head that is
    tied to an embedding; pure. What it computes then has no gradients."""
    copy = nnx.merge(*nnx.split(module))
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, (Linear, Embedding)):
            part.product = product
    return copy
