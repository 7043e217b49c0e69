"""The linear map and the table that every other layer is made of."""

from typing import Any, TypeVar

import jax
from flax import nnx

from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.params import (
    FusedKernel,
    Leaf,
    ParamReader,
    declare,
    get_base,
    get_spec,
    materialize,
    truncated_normal,
)
from maxlm.parallel.decode_kernels import LocalProduct
from maxlm.parallel.embedding import embed_tokens
from maxlm.parallel.local import get_layout, parse_spec
from maxlm.sharding import AxisRules

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


class Linear(nnx.Module):
    """``y = x · kernel + bias`` over named axes, e.g. embed → (heads, head_dim).

    Args:
        inputs, outputs: logical axis (or None) → size, in order; the kernel's shape is
            their concatenation.
        std: standard deviation of the truncated normal initialiser.
        role: "matrix" for hidden layers, "table" for an output head.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[Any, int],
        *,
        bias: bool,
        std: float,
        rules: AxisRules,
        dtype: Any,
        role: Any = "matrix",
    ):
        self.rules, self.dtype = rules, dtype
        self.product: LocalProduct | None = None
        """See :func:`set_product`."""
        self.kernel = declare(
            (*inputs.values(), *outputs.values()),
            (*inputs, *outputs),
            truncated_normal(std),
            role,
            contracting_dims=tuple(range(len(inputs))),
        )
        offsets = tuple(outputs.values()), tuple(outputs), jax.nn.initializers.zeros
        self.bias = declare(*offsets, "vector") if bias else None

    def __call__(self, x: jax.Array, *, seq_axis: str = "seq") -> jax.Array:
        """x [B, S, *inputs] → [B, S, *outputs] in the compute dtype; see
        :func:`project`."""
        return project(x, self, seq_axis=seq_axis)[0]


def project(
    x: jax.Array, *layers: Linear, seq_axis: str = "seq"
) -> tuple[jax.Array, ...]:
    """Applies several maps to one input [B, S, *inputs], which then crosses the wire
    once. ``seq_axis``: the logical axis of the results' sequence: "seq" within a layer,
    "residual" for what is added to the residual stream."""
    rules, dtype = layers[0].rules, layers[0].dtype
    tokens = parse_spec(rules.spec("batch", seq_axis), 2)
    uses = [
        ParamReader(get_spec(layer.kernel), rules, dtype, tokens, layer.product)
        for layer in layers
    ]
    held = [layer.kernel.get_value() for layer in layers]
    ys = [
        y if layer.bias is None else y + materialize(layer.bias, rules, dtype)
        for layer, y in zip(layers, _multiply(x.astype(dtype), uses, held), strict=True)
    ]
    return tuple(
        kernel.finish_output(y, use) if isinstance(kernel, Leaf) else y
        for y, use, kernel in zip(ys, uses, held, strict=True)
    )


def _multiply(
    x: jax.Array, uses: list[ParamReader], kernels: list[Any]
) -> list[jax.Array]:
    """Multiplies x by kernels at rest; all in one program, where none changes its
    input."""
    pairs = list(zip(uses, kernels, strict=True))
    fused = get_base(kernels[0])
    if isinstance(fused, FusedKernel):
        xs = [x] * len(kernels)
        ys = fused.multiply(x, uses)
    else:
        xs = [p.prepare_input(x, use) if isinstance(p, Leaf) else x for use, p in pairs]
        weights = [
            p.read_kernel(use) if isinstance(p, Leaf) else use.read(p)
            for use, p in pairs
        ]
        if all(own is x for own in xs):
            ys = uses[0].multiply(x, *weights)
        else:
            ys = (
                use.multiply(own, w)[0]
                for use, own, w in zip(uses, xs, weights, strict=True)
            )
    return [
        kernel.finish_product(y, own, use) if isinstance(kernel, Leaf) else y
        for y, own, (use, kernel) in zip(ys, xs, pairs, strict=True)
    ]


def set_product(module: ModuleT, product: LocalProduct) -> ModuleT:
    """Returns the module with another product in its linear maps, and in a head that is
    tied to an embedding; pure. What it computes then has no gradients."""
    copy = nnx.merge(*nnx.split(module))
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, (Linear, Embedding)):
            part.product = product
    return copy


def compute_residual_std(std: float, num_layers: int) -> float:
    """Computes the deviation of maps into the residual stream (Radford et al. 2019,
    §2.3)."""
    return std * (2 * num_layers) ** -0.5


class Embedding(nnx.Module):
    """A table [V, D]; indices outside it give NaN rather than a wrong row."""

    def __init__(
        self,
        axis: str | None,
        size: int,
        d_model: int,
        std: float,
        *,
        rules: AxisRules,
        dtype: Any,
    ):
        self.rules, self.dtype = rules, dtype
        self.product: LocalProduct | None = None
        """Of a head that is tied to the table; see :func:`set_product`."""
        self.table = declare(
            (size, d_model), (axis, "embed"), truncated_normal(std), "table"
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [..., S] → [..., S, D] in the compute dtype, for the residual
        stream."""
        reader = ParamReader(
            get_spec(self.table), self.rules, accumulation_dtype(self.dtype)
        )
        tokens = *get_layout(ids)[:-1], self.rules.residual

        def read_rows(param: Any, axes: tuple[str | None, ...] = ()) -> jax.Array:
            table = reader.read(param, axes)
            layout = *tokens, self.rules.mesh_axes((axes or reader.spec.axes)[-1])
            return embed_tokens(
                table.value, ids, table.compute_layout, layout, self.dtype
            )

        held = self.table.get_value()
        return (
            held.look_up(read_rows, reader)
            if isinstance(held, Leaf)
            else read_rows(held)
        )
