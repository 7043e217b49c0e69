"""Batches from the host's rows to the mesh."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.config import MaxlmError
from maxlm.config.errors import Count, Requirement
from maxlm.data.batch_source import BatchArraySpec
from maxlm.sharding import AxisRules


def batch_sharding(
    rules: AxisRules, mesh: Mesh, axes: Sequence[str | None] = ("seq",)
) -> NamedSharding:
    """Returns the sharding of arrays [A, B / A, ...]: micro-batches are whole, over
    pipeline stages too. ``axes``: the logical axis of each dimension of a row."""
    return NamedSharding(mesh, rules.spec(None, "batch", *axes))


def require_batch_split(
    batch_size: int,
    micro_batches: Count,
    row_lengths: Mapping[str, int],
    compute: AxisRules,
    sizes: Mapping[str, Count],
) -> Iterator[Requirement]:
    """Requires that a micro-batch's rows and sequences divide over the devices that
    split them. ``row_lengths``: tokens of the sequences in a row, by the setting that
    decides them. ``sizes``: devices, by mesh axis."""

    def make_error(message: str, rule: str, setting: str, divisor: Count) -> MaxlmError:
        axes = compute.mesh_axes(rule)
        split = "·".join(f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        name = setting.rpartition(".")[2]
        message = f"{message} does not divide over {split} (sharding.compute.{rule})"
        fix = f"use a {name} that is a multiple of {divisor}, or a smaller mesh"
        return MaxlmError(message, where=setting, fix=fix)

    def make_batch_error() -> MaxlmError:
        message = f"a micro-batch of {batch_size // micro_batches} sequences"
        return make_error(message, "batch", "data.batch_size", batch_divisor)

    batch_divisor = micro_batches * prod(sizes[axis] for axis in compute.batch)
    yield Requirement(batch_size % batch_divisor == 0, make_batch_error)
    for rule in ("seq", "residual"):
        num_pieces = prod(sizes[axis] for axis in compute.mesh_axes(rule))
        for setting, length in row_lengths.items():
            message = f"a sequence of {length} tokens"
            make_length_error = partial(make_error, message, rule, setting, num_pieces)
            yield Requirement(length % num_pieces == 0, make_length_error)


def get_local_row_indices(
    sharding: NamedSharding, lead_shape: tuple[int, ...]
) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, ascending.

    Args:
        sharding: of arrays with these leading axes alone; see :func:`batch_sharding`.
        lead_shape: (rows,) or (micro-batches, rows); rows are counted over both axes
            together, micro-batch by micro-batch.
    """
    row_numbers = np.arange(prod(lead_shape)).reshape(lead_shape)
    local_rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map(lead_shape).values():
        assert index is not None  # The map has devices of this process alone.
        local_rows.update(row_numbers[index].ravel().tolist())
    return sorted(local_rows)


def make_global_batch(
    batch: Mapping[str, np.ndarray],
    arrays: Mapping[str, BatchArraySpec],
    row_indices: Sequence[int],
    rules: AxisRules,
    mesh: Mesh,
    lead_shape: tuple[int, ...],
    token_order: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """Puts a process's rows on its devices, as its part of arrays of leading axes
    ``lead_shape``.

    Args:
        batch: arrays [len(row_indices), ...], row i being global row
            ``row_indices[i]``.
        arrays: a row of each.
        token_order: the token that stands at each place of a sequence; default: its
            own.
    """
    num_lead_axes = len(lead_shape)
    row_numbers = np.arange(prod(lead_shape)).reshape(lead_shape)
    place_of_row = {row: place for place, row in enumerate(row_indices)}

    def put(array: np.ndarray, axes: Sequence[str | None]) -> jax.Array:
        if token_order is not None and "seq" in axes:
            array = array.take(token_order, axis=1 + axes.index("seq"))

        def get_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # The leading axes choose rows, the others a part of each.
            shard_rows = row_numbers[index[:num_lead_axes]]
            places = [place_of_row[row] for row in shard_rows.ravel().tolist()]
            within_row = index[num_lead_axes:]
            values = array[places][(slice(None), *within_row)]
            return values.reshape(*shard_rows.shape, *values.shape[1:])

        shape = (*lead_shape, *array.shape[1:])
        sharding = batch_sharding(rules, mesh, axes)
        return jax.make_array_from_callback(shape, sharding, get_shard)

    return {name: put(array, arrays[name].axes) for name, array in batch.items()}
