"""Products with quantized matrices, on one device's shards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from maxlm.parallel.operands import MapAxes
from maxlm.quantization.activations import (
    ActivationRounding,
    RoundedTokens,
    round_tokens,
)
from maxlm.quantization.formats.floats8 import Float8Format
from maxlm.quantization.formats.format import Format, Planes
from maxlm.quantization.formats.integer import IntegerFormat

DENSE_BYTES = 4 << 20
"""Most bytes of a matrix that are decoded at a time: a product is made of as many parts
of its outputs, so that the matrix never stands whole beside its codes."""


@dataclass(frozen=True)
class QuantizedProduct:
    """The product with a matrix [in, out] that is stored in a number format: its values
    are decoded in x's dtype, some outputs at a time.

    Its arrays are the format's planes, transposed unless ``rows_first``: [in', out'], as
    dense kernels lie.
    """

    format: Format
    rows_first: bool
    """Whether planes are [out', in'], as those of a table are."""
    activations: ActivationRounding | None = None
    """What x is rounded to, each token by itself: int8 beside int8 weights with a scale
    for each output, or fp8 beside such in E4M3, are multiplied as codes. None: it is
    not."""

    def multiply(
        self,
        x: jax.Array,
        arrays: Mapping[str, jax.Array],
        axes: MapAxes,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        num_inputs = x.shape[-1]
        if self.activations is not None:
            tokens = round_tokens(x, self.activations, axes.inputs)
            if self._multiplies_codes:
                return self._multiply_codes(tokens, arrays, dtype or x.dtype)
            x = tokens.decode().astype(x.dtype)

        def multiply_part(planes: Planes) -> jax.Array:
            """[..., in] · the decoded part [R, in] → [..., R]."""
            rows = self.format.decode(planes, x.dtype)
            inputs = ((x.ndim - 1,), (1,))
            return lax.dot_general(
                x, rows, (inputs, ((), ())), preferred_element_type=dtype
            )

        parts = self._split_rows(arrays, num_inputs * x.dtype.itemsize)
        if parts is None:
            return multiply_part(self._get_planes(arrays))
        products = lax.map(multiply_part, parts)  # [parts, ..., R]
        return jnp.moveaxis(products, 0, -2).reshape(*x.shape[:-1], -1)

    def multiply_transposed(
        self, d_y: jax.Array, arrays: Mapping[str, jax.Array], axes: MapAxes
    ) -> jax.Array:
        outputs = ((d_y.ndim - 1,), (0,))
        num_outputs = d_y.shape[-1]

        def multiply_part(planes: Planes, d_y: jax.Array) -> jax.Array:
            """[..., R] · the decoded part [R, in] → [..., in] in fp32 or wider."""
            rows = self.format.decode(planes, d_y.dtype)
            wide = jnp.promote_types(d_y.dtype, jnp.float32)
            return lax.dot_general(
                d_y, rows, (outputs, ((), ())), preferred_element_type=wide
            )

        num_inputs = self._count_inputs(arrays, num_outputs)
        parts = self._split_rows(arrays, num_inputs * d_y.dtype.itemsize)
        if parts is None:
            return multiply_part(self._get_planes(arrays), d_y).astype(d_y.dtype)
        num_parts = jax.tree.leaves(parts)[0].shape[0]
        d_y_parts = d_y.reshape(*d_y.shape[:-1], num_parts, -1)
        d_y_parts = jnp.moveaxis(d_y_parts, -2, 0)

        def add_part(
            d_x: jax.Array, part: tuple[Planes, jax.Array]
        ) -> tuple[jax.Array, None]:
            planes, d_y_part = part
            return d_x + multiply_part(planes, d_y_part), None

        wide = jnp.promote_types(d_y.dtype, jnp.float32)
        zeros = jnp.zeros((*d_y.shape[:-1], num_inputs), wide)
        d_x, _ = lax.scan(add_part, zeros, (parts, d_y_parts))
        return d_x.astype(d_y.dtype)

    def compute_gradient(
        self, x: jax.Array, d_y: jax.Array, axes: MapAxes
    ) -> dict[str, jax.Array]:
        raise NotImplementedError("quantized matrices are not trained")

    @property
    def _multiplies_codes(self) -> bool:
        """Whether codes of the weights are of the same type as those of tokens, and all
        inputs of an output share a scale."""
        if self.activations == "int8":
            expected = IntegerFormat(8, scale_dtype="float32")
            format = self.format
            return (
                isinstance(format, IntegerFormat)
                and replace(format, scale_dtype="float32") == expected
            )
        return self.format == Float8Format()

    def _multiply_codes(
        self,
        tokens: RoundedTokens,
        arrays: Mapping[str, jax.Array],
        dtype: DTypeLike,
    ) -> jax.Array:
        """Multiplies codes [..., in] by the weights' codes, summed in int32 or fp32:
        what a chip's int8 or fp8 units compute."""
        planes = self._get_planes(arrays)
        inputs = ((tokens.codes.ndim - 1,), (1,))
        sums = lax.dot_general(
            tokens.codes,
            planes["codes"],
            (inputs, ((), ())),
            preferred_element_type=(
                jnp.int32 if self.activations == "int8" else jnp.float32
            ),
        )
        scales = planes["scales"].astype(jnp.float32)[:, 0]
        return (sums.astype(jnp.float32) * tokens.scales * scales).astype(dtype)

    def _get_planes(self, arrays: Mapping[str, jax.Array]) -> Planes:
        """Returns the format's planes, [..., rows', columns']."""
        if self.rows_first:
            return dict(arrays)
        return {name: jnp.swapaxes(array, -1, -2) for name, array in arrays.items()}

    def _count_inputs(self, arrays: Mapping[str, jax.Array], num_outputs: int) -> int:
        values = jax.eval_shape(self.format.decode, self._get_planes(arrays))
        return prod(values.shape) // num_outputs

    def _split_rows(
        self, arrays: Mapping[str, jax.Array], row_bytes: int
    ) -> Planes | None:
        """Returns planes [parts, rows', columns'] of equal parts of the outputs, each of
        :data:`DENSE_BYTES` decoded at most where it can be; None: in one part."""
        planes = self._get_planes(arrays)
        row_counts = {name: plane.shape[-2] for name, plane in planes.items()}
        num_rows = jax.eval_shape(self.format.decode, planes).shape[-2]
        # Planes that all rows share cannot be split.
        shared = {name for name, count in row_counts.items() if count == 1}
        split_counts = [
            count for name, count in row_counts.items() if name not in shared
        ]
        # A part is whole blocks of rows.
        block_rows, _ = self.format.block_shape
        num_blocks = num_rows // block_rows if num_rows % block_rows == 0 else 1
        fewest = -(-num_rows * row_bytes // DENSE_BYTES)
        fitting = (
            parts
            for parts in range(max(fewest, 1), num_blocks + 1)
            if all(count % parts == 0 for count in (num_blocks, *split_counts))
        )
        num_parts = next(fitting, 1)
        if num_parts == 1:
            return None
        parts = {}
        for name, plane in planes.items():
            if name in shared:
                parts[name] = jnp.broadcast_to(plane, (num_parts, *plane.shape))
            else:
                parts[name] = plane.reshape(num_parts, -1, plane.shape[-1])
        return parts
