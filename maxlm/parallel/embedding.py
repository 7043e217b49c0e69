"""Table look-ups on a mesh: rows split over the vocabulary, columns over storage.

A table stored in slices of columns (ZeRO-3) is never gathered. Each device looks up, in
its own columns, the tokens of all devices that share the table, and an all-to-all turns
slices of columns into slices of tokens: tokens × D crosses the wire rather than
vocabulary × D, and only once back for the gradient. Rows split over the vocabulary
(tensor parallelism) give partial sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from maxlm.parallel.local import (
    Axes,
    Dims,
    axis_indices,
    axis_size,
    gather,
    get_layout,
    make_spec,
    map_shards,
    reduce,
)


class _Layouts:
    """Layouts of a table in storage, and of ids."""

    def __init__(self, table: jax.Array, ids: jax.Array, table_used: Dims):
        self.table_stored = get_layout(table)
        self.table_used = table_used
        self.ids = get_layout(ids)
        vocab_axes, column_axes = table_used
        id_dims = {axis: dim for dim, axes in enumerate(self.ids) for axis in axes}
        slice_axes = self.table_stored[1][len(column_axes) :]
        self.exchanged: list[tuple[str, int]] = []
        """(mesh axis, dimension of ``ids`` it splits), of the columns; outermost
        first."""
        # An inner axis cannot be exchanged without the outer ones.
        if all(axis in id_dims for axis in slice_axes):
            self.exchanged = [(axis, id_dims[axis]) for axis in slice_axes]
        columns = self.table_stored[1] if self.exchanged else column_axes
        self.table_gathered: Dims = (vocab_axes, columns)
        """Layout of the table during the look-up: gathered where no all-to-all can
        exchange it."""

    @property
    def vocab_axes(self) -> Axes:
        return self.table_used[0]

    @property
    def summed_axes(self) -> Axes:
        """Axes along which devices have gradients of different tokens, and the same
        columns."""
        id_axes = {axis for axes in self.ids for axis in axes}
        exchanged_axes = {axis for axis, _ in self.exchanged}
        return tuple(sorted(id_axes - exchanged_axes))


def _find_rows(
    ids: jax.Array, num_rows: int, vocab_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns indices into this device's rows, and whether they are there."""
    rows = ids - vocab_index[0] * num_rows
    return rows, (rows >= 0) & (rows < num_rows)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def embed_tokens(
    table: jax.Array,
    ids: jax.Array,
    table_layout: Dims,
    out_layout: Dims,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns rows of a table, [..., S, D]; reverse-mode differentiable in the table.

    Args:
        table: [V, D], fp32, in its storage layout.
        ids: int [..., S]; those outside 0..V-1 give NaN.
        table_layout: the mesh axes of V and D in use; they begin those in storage.
        out_layout: the mesh axes of the result's dimensions, which begin with those of
            ``ids``.
        dtype: of the result; gradients are summed within a device in fp32, between
            devices in it.
    """
    layouts = _Layouts(table, ids, table_layout)
    vocab_size = table.shape[0]

    def local(table, ids, vocab_index):
        # What crosses the wire is cast before, what does not after its rows are found.
        if layouts.table_stored != layouts.table_gathered:
            table = gather(
                table.astype(dtype), layouts.table_stored, layouts.table_gathered
            )
        # Everyone looks up, in its own columns, the tokens of all that share the table.
        for axis, dim in layouts.exchanged:
            ids = lax.all_gather(ids, axis, axis=dim, tiled=True)
        # A token's row is on one device of those that split the vocabulary; the others
        # add zeros.
        rows, is_here = _find_rows(ids, len(table), vocab_index)
        values = table[jnp.where(is_here, rows, 0)].astype(dtype)
        y = jnp.where(is_here[..., None], values, 0)
        y = reduce(y, layouts.vocab_axes, (*layouts.ids, table_layout[1]), out_layout)
        # Each gets back all columns of its own tokens.
        for axis, dim in reversed(layouts.exchanged):
            y = lax.all_to_all(
                y, axis, split_axis=dim, concat_axis=y.ndim - 1, tiled=True
            )
        return y

    run = map_shards(
        local,
        in_specs=(
            make_spec(layouts.table_stored),
            make_spec(layouts.ids),
            make_spec((layouts.vocab_axes,)),
        ),
        out_specs=make_spec(out_layout),
    )
    y = run(table, ids, axis_indices(layouts.vocab_axes))
    is_known = (ids >= 0) & (ids < vocab_size)
    is_known = jax.sharding.reshard(is_known, make_spec(out_layout[:-1]))
    return jnp.where(is_known[..., None], y, jnp.nan)


def _forward(table, ids, table_layout, out_layout, dtype):
    y = embed_tokens(table, ids, table_layout, out_layout, dtype)
    return y, (table, ids)


def _backward(table_layout, out_layout, dtype, saved, d_y):
    table, ids = saved
    layouts = _Layouts(table, ids, table_layout)

    def local(table, ids, vocab_index, d_y):
        # The table may be stored in more parts of rows than it is used in.
        vocab_size = table.shape[0] * axis_size(layouts.table_stored[0])
        num_rows = vocab_size // axis_size(layouts.vocab_axes)
        # The exchange of the forward pass, turned round.
        for axis, dim in layouts.exchanged:
            ids = lax.all_gather(ids, axis, axis=dim, tiled=True)
            d_y = lax.all_to_all(
                d_y, axis, split_axis=d_y.ndim - 1, concat_axis=dim, tiled=True
            )
        d_y = gather(d_y, out_layout, (*layouts.ids, table_layout[1]))

        # Each token's gradient is added to its row.
        zeros = jnp.zeros((num_rows, d_y.shape[-1]), jnp.float32)
        rows, is_here = _find_rows(ids, num_rows, vocab_index)
        rows = jnp.where(is_here, rows, num_rows)  # past the end: dropped
        d_table = zeros.at[rows].add(d_y.astype(jnp.float32), mode="drop")
        d_table = reduce(
            d_table.astype(dtype),
            layouts.summed_axes,
            layouts.table_gathered,
            layouts.table_stored,
        )
        return d_table.astype(table.dtype)

    run = map_shards(
        local,
        in_specs=(
            make_spec(layouts.table_stored),
            make_spec(layouts.ids),
            make_spec((layouts.vocab_axes,)),
            make_spec(out_layout),
        ),
        out_specs=make_spec(layouts.table_stored),
    )
    return run(table, ids, axis_indices(layouts.vocab_axes), d_y), None


embed_tokens.defvjp(_forward, _backward)
