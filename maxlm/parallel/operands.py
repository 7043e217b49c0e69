"""What a linear map multiplies with: a kernel as one array, or as several that stand for
it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from maxlm.parallel.decode_kernels import LocalProduct
from maxlm.parallel.local import Axes, Dims


class MapAxes(NamedTuple):
    """The mesh axes that split a map's arrays while it is computed on shards: what is
    reduced over all of an array is reduced over these, too."""

    tokens: Axes
    inputs: Axes
    outputs: Axes


class MatrixProduct(Protocol):
    """A product with a matrix [in, out] that is stored as arrays other than its values,
    on one device's shards. Compared by value: programs are compiled for it."""

    def multiply(
        self,
        x: jax.Array,
        arrays: Mapping[str, jax.Array],
        axes: MapAxes,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Multiplies x [B, S, in] by the matrix: [B, S, out] in ``dtype``; None: in
        x's."""
        ...

    def multiply_transposed(
        self, d_y: jax.Array, arrays: Mapping[str, jax.Array], axes: MapAxes
    ) -> jax.Array:
        """Multiplies d_y [B, S, out] by the matrix's transpose: [B, S, in] in d_y's
        dtype."""
        ...

    def compute_gradient(
        self, x: jax.Array, d_y: jax.Array, axes: MapAxes
    ) -> dict[str, jax.Array]:
        """Computes the arrays' gradients from x [B, S, in] and d_y [B, S, out], summed
        over this device's tokens; called where :attr:`PackedOperand.is_trained`."""
        ...


OperandArrays = Mapping[str, jax.Array]
"""What an operand is stored as: arrays by name."""
KERNEL = "kernel"
"""The name of a dense operand's one array."""


class DenseOperand(NamedTuple):
    """A kernel [*inputs, *outputs] of a map: one array. Static."""

    layout: Dims
    """Mesh axes of its dimensions in use, which begin those in storage."""
    product: LocalProduct | None
    """Of the forward pass; None: XLA's dot. Gradients are XLA's."""

    @property
    def array_layouts(self) -> dict[str, Dims]:
        """Mesh axes of the arrays' dimensions in use, by name."""
        return {KERNEL: self.layout}

    @property
    def is_trained(self) -> bool:
        return True


@dataclass(frozen=True)
class PackedOperand:
    """A kernel [*inputs, *outputs] of a map that is stored as several arrays, for which
    inputs and outputs are one dimension each. Static."""

    layout: Dims
    """Mesh axes of the kernel's dimensions in use."""
    named_layouts: tuple[tuple[str, Dims], ...]
    """Mesh axes of the arrays' dimensions in use, with their names."""
    output_sizes: tuple[int, ...]
    product: MatrixProduct
    is_trained: bool = False
    """Whether the arrays have gradients."""

    @property
    def array_layouts(self) -> dict[str, Dims]:
        """Mesh axes of the arrays' dimensions in use, by name."""
        return dict(self.named_layouts)


MapOperand = DenseOperand | PackedOperand
