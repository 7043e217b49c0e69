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

    def __init__(self, table: jax.Array, ids: jax.Array, used: Dims):
        self.table, self.ids = get_layout(table), get_layout(ids)
        split_dims = {axis: dim for dim, axes in enumerate(self.ids) for axis in axes}
        columns = self.table[1][len(used[1]) :]
        # An inner axis cannot be exchanged without the outer ones.
        exchanges = all(axis in split_dims for axis in columns)
        self.exchanged = (
            [(axis, split_dims[axis]) for axis in columns] if exchanges else []
        )
        """(mesh axis, dimension of ``ids`` it splits), of the columns; outermost
        first."""
        self.held = (used[0], self.table[1] if self.exchanged else used[1])
        """Layout of the table during the look-up: gathered where no all-to-all can
        exchange it."""


def _own_rows(ids, table, number):
    """Indices into this device's rows, and whether they are there."""
    rows = ids - number[0] * table.shape[0]
    return rows, (rows >= 0) & (rows < table.shape[0])


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
    own = _Layouts(table, ids, table_layout)
    vocab = table_layout[0]
    size = table.shape[0]

    def local(table, ids, number):
        table = gather(table.astype(dtype), own.table, own.held)
        everyone = ids
        for axis, dim in own.exchanged:
            everyone = lax.all_gather(everyone, axis, axis=dim, tiled=True)
        rows, here = _own_rows(everyone, table, number)
        y = jnp.where(here[..., None], table[jnp.where(here, rows, 0)], 0)
        y = reduce(y, vocab, (*own.ids, table_layout[1]), out_layout)
        for axis, dim in reversed(own.exchanged):
            y = lax.all_to_all(
                y, axis, split_axis=dim, concat_axis=y.ndim - 1, tiled=True
            )
        return y

    specs = make_spec(own.table), make_spec(own.ids), make_spec((vocab,))
    y = map_shards(local, specs, make_spec(out_layout))(table, ids, axis_indices(vocab))
    known = (ids >= 0) & (ids < size)
    return jnp.where(
        jax.sharding.reshard(known, make_spec(out_layout[:-1]))[..., None], y, jnp.nan
    )


def _forward(table, ids, used, out, dtype):
    return embed_tokens(table, ids, used, out, dtype), (table, ids)


def _backward(used, out, dtype, saved, d_y):
    table, ids = saved
    own = _Layouts(table, ids, used)
    vocab = used[0]

    def local(table, ids, number, d_y):
        held = (table.shape[0] * axis_size(own.table[0]) // axis_size(vocab), -1)
        for axis, dim in own.exchanged:
            ids = lax.all_gather(ids, axis, axis=dim, tiled=True)
            d_y = lax.all_to_all(
                d_y, axis, split_axis=d_y.ndim - 1, concat_axis=dim, tiled=True
            )
        d_y = gather(d_y, out, (*own.ids, used[1]))
        zeros = jnp.zeros((held[0], d_y.shape[-1]), jnp.float32)
        rows, here = _own_rows(ids, zeros, number)
        rows = jnp.where(here, rows, held[0])  # dropped
        d_table = zeros.at[rows].add(d_y.astype(jnp.float32), mode="drop").astype(dtype)
        summed = {axis for axes in own.ids for axis in axes} - {
            axis for axis, _ in own.exchanged
        }
        d_table = reduce(d_table, tuple(sorted(summed)), own.held, own.table)
        return d_table.astype(table.dtype)

    specs = (
        make_spec(own.table),
        make_spec(own.ids),
        make_spec((vocab,)),
        make_spec(out),
    )
    run = map_shards(local, specs, make_spec(own.table))
    return run(table, ids, axis_indices(vocab), d_y), None


embed_tokens.defvjp(_forward, _backward)
