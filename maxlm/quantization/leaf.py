"""A matrix that is stored in a number format.

Letters: R outputs, C inputs of a matrix; V vocabulary, D model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.config import MaxlmError
from maxlm.models.params import (
    PackedParam,
    PackedWeight,
    ParamReader,
    ParamSpec,
    RowReader,
    ShardedWeight,
    StoredParam,
)
from maxlm.models.targets import split_dims
from maxlm.parallel.linear import fuse_kernels
from maxlm.parallel.local import (
    Dims,
    axis_size,
    gather,
    get_layout,
    make_spec,
    map_shards,
    parse_spec,
)
from maxlm.parallel.operands import PackedOperand
from maxlm.quantization.activations import ActivationRounding
from maxlm.quantization.formats.format import Format, Planes
from maxlm.quantization.product import QuantizedProduct

LogicalAxes = tuple[str | None, ...]


@dataclass(frozen=True)
class MatrixForm:
    """What the arrays of a quantized parameter mean. Matrices [..., C, R] of a kernel
    [..., *inputs, *outputs], or of a table [..., R, C], each by itself."""

    format: Format
    dense: ParamSpec
    """The declaration of the array that they stand for."""
    activations: ActivationRounding | None = None
    """What inputs of products with it are rounded to; None: they are not."""

    @property
    def rows_first(self) -> bool:
        """Whether the outputs are the first dimension, as a table's rows are."""
        return not self.dense.contracting_dims

    @property
    def num_lead_dims(self) -> int:
        """Dimensions before the matrix: layers, experts."""
        if self.rows_first:
            return len(self.dense.shape) - 2
        return split_dims(self.dense)[0]

    @property
    def input_dims(self) -> tuple[int, ...]:
        """The dense array's dimensions of inputs, in order."""
        if self.rows_first:
            return (len(self.dense.shape) - 1,)
        start, end = split_dims(self.dense)
        return tuple(range(start, end))

    @property
    def output_dims(self) -> tuple[int, ...]:
        if self.rows_first:
            return (len(self.dense.shape) - 2,)
        _, start = split_dims(self.dense)
        return tuple(range(start, len(self.dense.shape)))

    @property
    def num_inputs(self) -> int:
        return prod(self.dense.shape[dim] for dim in self.input_dims)

    @property
    def num_outputs(self) -> int:
        return prod(self.dense.shape[dim] for dim in self.output_dims)

    def declare_planes(self) -> dict[str, ParamSpec]:
        """Returns the declarations of the arrays: [..., C', R'], or of a table [...,
        R', C']."""
        lead = self.dense.shape[: self.num_lead_dims]
        lead_axes = self.dense.axes[: self.num_lead_dims]
        planes = self.format.describe_planes(self.num_outputs, self.num_inputs)
        specs = {}
        for name, plane in planes.items():
            shape = (plane.rows, plane.columns)
            axes = self.list_plane_axes(plane.rows, plane.columns)
            if not self.rows_first:
                shape = shape[::-1]
                axes = axes[::-1]
            specs[name] = ParamSpec(
                (*lead, *shape),
                (*lead_axes, *axes),
                jax.nn.initializers.zeros,
                "packed",
                dtype=plane.dtype,
            )
        return specs

    def list_plane_axes(self, rows: int, columns: int) -> LogicalAxes:
        """Returns the logical axes of an array [rows, columns] of one matrix: those of
        the first dimension of outputs and of inputs, along which it is split as the
        matrix is; what all rows or columns share is whole."""
        row_axis = self.dense.axes[self.output_dims[0]]
        column_axis = self.dense.axes[self.input_dims[0]]
        return (
            row_axis if rows > 1 else None,
            column_axis if columns > 1 else None,
        )

    def to_matrices(self, dense: jax.Array) -> jax.Array:
        """Returns a dense array as matrices [..., R, C]."""
        lead = dense.shape[: dense.ndim - len(self.input_dims) - len(self.output_dims)]
        if self.rows_first:
            return dense
        flat = dense.reshape(*lead, self.num_inputs, self.num_outputs)
        return jnp.swapaxes(flat, -1, -2)

    def encode(self, dense: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of a dense array, each number rounded to the nearest."""
        return self.lay_out(self.format.encode(self.to_matrices(dense)))

    def lay_out(self, planes: Planes) -> dict[str, jax.Array]:
        """Returns a format's planes [..., R', C'] as the parameter's arrays."""
        if self.rows_first:
            return dict(planes)
        return {name: jnp.swapaxes(plane, -1, -2) for name, plane in planes.items()}

    def get_planes(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the format's planes; inverts :meth:`lay_out`."""
        return self.lay_out(arrays)


@dataclass(frozen=True, eq=False)
class QuantizedParam(PackedParam):
    """A matrix, or a table, that is stored in a number format: an array for each of the
    format's planes. It is never trained. An array's canonical name is the parameter's
    and the plane's: ``layers.mlp.up.kernel.scales``."""

    arrays: Mapping[str, StoredParam]
    """By the planes' names."""
    form: MatrixForm
    """What they mean."""

    @property
    def dense_spec(self) -> ParamSpec:
        return self.form.dense

    @property
    def product(self) -> QuantizedProduct:
        form = self.form
        return QuantizedProduct(form.format, form.rows_first, form.activations)

    @classmethod
    def declare(
        cls,
        spec: ParamSpec,
        format: Format,
        activations: ActivationRounding | None = None,
    ) -> Self:
        """Returns the leaf of declarations of a matrix or table in a format. Raises
        MaxlmError: it is no whole number of blocks."""
        form = MatrixForm(format, spec, activations)
        return cls(form.declare_planes(), form)

    def from_dense(self, dense: jax.Array) -> Self:
        form = self.form
        lead = dense.shape[: form.num_lead_dims]
        matrices = dense.reshape(-1, *dense.shape[len(lead) :])
        # One after the other: what rounding needs beside it is many times as large.
        arrays = lax.map(lambda x: form.encode(x.astype(jnp.float32)), matrices)
        arrays = {
            name: array.reshape(*lead, *array.shape[1:])
            for name, array in arrays.items()
        }
        return type(self)(arrays, form)

    def merge(self) -> jax.Array:
        form = self.form
        values = form.format.decode(form.get_planes(self.arrays))
        lead = values.shape[:-2]
        if form.rows_first:
            return values
        layer_shape = form.dense.shape[form.num_lead_dims :]
        return jnp.swapaxes(values, -1, -2).reshape(*lead, *layer_shape)

    def read_kernel(self, reader: ParamReader) -> PackedWeight:
        arrays, layouts = self._read_arrays(reader)
        form = self.form
        dims = (*form.input_dims, *form.output_dims)
        axes = tuple(form.dense.axes[dim] for dim in dims)
        self._check_split(reader, axes)
        operand = PackedOperand(
            layout=parse_spec(reader.rules.spec(*axes), len(axes)),
            named_layouts=tuple(layouts.items()),
            output_sizes=tuple(form.dense.shape[dim] for dim in form.output_dims),
            product=self.product,
        )
        return PackedWeight(arrays, operand)

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        """Returns the dense values, gathered and decoded; of one layer."""
        arrays, layouts = self._read_arrays(reader)
        form = self.form
        num_lead = next(iter(arrays.values())).ndim - 2
        lead_axes = form.dense.axes[form.num_lead_dims - num_lead : form.num_lead_dims]
        matrix_dims = sorted((*form.input_dims, *form.output_dims))
        axes = (*lead_axes, *(form.dense.axes[dim] for dim in matrix_dims))
        self._check_split(reader, axes)
        layout = parse_spec(reader.rules.spec(*axes), len(axes))
        matrix_shape = [form.dense.shape[dim] for dim in matrix_dims]
        local_shape = [
            size // axis_size(mesh_axes)
            for size, mesh_axes in zip(matrix_shape, layout[num_lead:], strict=True)
        ]
        stored = {name: get_layout(array) for name, array in arrays.items()}

        def decode(arrays: Mapping[str, jax.Array]) -> jax.Array:
            whole = {
                name: gather(array, stored[name], layouts[name])
                for name, array in arrays.items()
            }
            values = form.format.decode(form.get_planes(whole), reader.dtype)
            if not form.rows_first:
                values = jnp.swapaxes(values, -1, -2)
            return values.reshape(*values.shape[:num_lead], *local_shape)

        in_specs = {name: make_spec(dims) for name, dims in stored.items()}
        values = map_shards(decode, (in_specs,), make_spec(layout))(arrays)
        return ShardedWeight(values, layout)

    def look_up(self, read_rows: RowReader, reader: ParamReader) -> jax.Array:
        form = self.form
        counts = {array.shape[0] for array in self.arrays.values()}
        has_own_rows = form.rows_first and counts <= {form.num_outputs, 1}
        if not has_own_rows:
            # Rows share scales with their neighbours: all are decoded.
            return read_rows(self, ())
        # Codes and scales of the rows alone, in a dtype that holds all of theirs.
        planes = {}
        for name, array in self.arrays.items():
            rows, columns = array.shape
            if rows == 1:
                planes[name] = array
                continue
            axes = form.list_plane_axes(rows, columns)
            plane_rows = read_rows(array, axes, jnp.float32)
            planes[name] = plane_rows.astype(array.dtype)
        return form.format.decode(planes, reader.dtype)

    def stand_beside(self, others: Sequence[Self]) -> Self | None:
        leaves = (self, *others)
        if any(leaf.product != self.product for leaf in leaves):
            return None
        # What all outputs share has no place of its own for each map.
        for leaf in leaves:
            if any(array.shape[-1] == 1 for array in leaf.arrays.values()):
                return None
        arrays = {
            name: fuse_kernels([leaf.arrays[name] for leaf in leaves])
            for name in self.arrays
        }
        return type(self)(arrays, self.form)

    def _read_arrays(
        self, reader: ParamReader
    ) -> tuple[dict[str, jax.Array], dict[str, Dims]]:
        """Returns the arrays in their own dtypes, in layouts that begin with those in
        use, and these."""
        form = self.form
        arrays: dict[str, jax.Array] = {}
        layouts: dict[str, Dims] = {}
        for name, array in self.arrays.items():
            num_lead = array.ndim - 2
            lead_axes = form.dense.axes[
                form.num_lead_dims - num_lead : form.num_lead_dims
            ]
            rows, columns = array.shape[-2:]
            if not form.rows_first:
                rows, columns = columns, rows
            axes = form.list_plane_axes(rows, columns)
            if not form.rows_first:
                axes = axes[::-1]
            spec = reader.rules.spec(*lead_axes, *axes)
            used = parse_spec(spec, array.ndim)
            stored = get_layout(array)
            begins = all(
                have[: len(want)] == want
                for have, want in zip(stored, used, strict=True)
            )
            arrays[name] = array if begins else reshard(array, spec)
            layouts[name] = used
        return arrays, layouts

    def _check_split(self, reader: ParamReader, axes: LogicalAxes) -> None:
        """Raises MaxlmError: a mesh axis splits a matrix within its blocks."""
        form = self.form
        block_rows, block_columns = form.format.block_shape
        for dims, size, block in (
            (form.output_dims, form.num_outputs, block_rows),
            (form.input_dims, form.num_inputs, block_columns),
        ):
            first, *others = (form.dense.axes[dim] for dim in dims)
            ways = axis_size(reader.rules.mesh_axes(first))
            inner = [axis for axis in others if reader.rules.mesh_axes(axis)]
            if inner or (size % (ways * block) and ways > 1):
                axis = inner[0] if inner else first
                message = f"{size} values lie on {ways} devices, and blocks of {block} "
                message += f"of {form.format.name} stay together"
                fix = f"split the axis {axis} over fewer devices, or use another format"
                raise MaxlmError(message, where="quantization", fix=fix)


_Static: TypeAlias = tuple[tuple[str, ...], MatrixForm]


def _flatten(leaf: QuantizedParam) -> tuple[tuple[StoredParam, ...], _Static]:
    # By name, as JAX orders dicts: planes come in any order.
    names = tuple(sorted(leaf.arrays))
    return tuple(leaf.arrays[name] for name in names), (names, leaf.form)


def _flatten_with_keys(
    leaf: QuantizedParam,
) -> tuple[list[tuple[Any, StoredParam]], _Static]:
    arrays, static = _flatten(leaf)
    names, _ = static
    children = [
        (jax.tree_util.GetAttrKey(name), array)
        for name, array in zip(names, arrays, strict=True)
    ]
    return children, static


def _unflatten(static: _Static, children: Iterable[StoredParam]) -> QuantizedParam:
    names, form = static
    return QuantizedParam(dict(zip(names, children, strict=True)), form)


jax.tree_util.register_pytree_with_keys(
    QuantizedParam, _flatten_with_keys, _unflatten, _flatten
)
