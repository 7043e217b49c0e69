"""Batches from the host's rows to the mesh."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.config import MaxlmError
from maxlm.config.errors import Requirement
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
    micro_batches: Any,
    row_lengths: Mapping[str, int],
    compute: AxisRules,
    sizes: Mapping[str, Any],
) -> Iterator[Requirement]:
    """Requires that a micro-batch's rows and sequences divide over the devices that
    split them. ``row_lengths``: tokens of the sequences in a row, by the setting that
    decides them. ``sizes``: devices, by mesh axis."""

    def refuse(message: str, rule: str, setting: str, multiple: int) -> MaxlmError:
        axes = getattr(compute, rule)
        split = "·".join(f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        name = setting.rpartition(".")[2]
        message = f"{message} does not divide over {split} (sharding.compute.{rule})"
        fix = f"use a {name} that is a multiple of {multiple}, or a smaller mesh"
        return MaxlmError(message, where=setting, fix=fix)

    def refuse_rows() -> MaxlmError:
        message = f"a micro-batch of {batch_size // micro_batches} sequences"
        return refuse(message, "batch", "data.batch_size", rows)

    rows = micro_batches * prod(sizes[axis] for axis in compute.batch)
    yield Requirement(batch_size % rows == 0, refuse_rows)
    for rule in ("seq", "residual"):
        num_pieces = prod(sizes[axis] for axis in getattr(compute, rule))
        for setting, length in row_lengths.items():
            message = f"a sequence of {length} tokens"
            refuse_length = partial(refuse, message, rule, setting, num_pieces)
            yield Requirement(length % num_pieces == 0, refuse_length)


def get_local_row_indices(
    sharding: NamedSharding, lead_shape: tuple[int, ...]
) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, ascending.

    Args:
        sharding: of arrays with these leading axes alone; see :func:`batch_sharding`.
        lead_shape: (rows,) or (micro-batches, rows); rows are counted over both axes
            together, micro-batch by micro-batch.
    """
    numbers = np.arange(prod(lead_shape)).reshape(lead_shape)
    slices: Any = sharding.addressable_devices_indices_map(lead_shape).values()
    return sorted({row for index in slices for row in numbers[index].ravel().tolist()})


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
    numbers = np.arange(prod(lead_shape)).reshape(lead_shape)
    place_of = {row: i for i, row in enumerate(row_indices)}

    def put(array: np.ndarray, axes: Sequence[str | None]) -> jax.Array:
        if token_order is not None and "seq" in axes:
            array = array.take(token_order, axis=1 + axes.index("seq"))

        def get_shard(index: Any) -> np.ndarray:
            # The leading axes choose rows, the others a part of each.
            row_numbers = numbers[index[: len(lead_shape)]]
            places = [place_of[row] for row in row_numbers.ravel().tolist()]
            row_index = index[len(lead_shape) :]
            rows = array[places][(slice(None), *row_index)]
            return rows.reshape(*row_numbers.shape, *rows.shape[1:])

        shape = (*lead_shape, *array.shape[1:])
        sharding = batch_sharding(rules, mesh, axes)
        return jax.make_array_from_callback(shape, sharding, get_shard)

    return {name: put(array, arrays[name].axes) for name, array in batch.items()}
