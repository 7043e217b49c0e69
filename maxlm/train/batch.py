"""Batches from the host's rows to the mesh."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from maxlm.sharding import AxisRules


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """The rows of a global batch that this process's devices hold, ascending.

    Args:
        sharding, shape: of the batch's arrays, [rows, ...] or [micro-batches, rows, ...]; rows are
            counted over both leading axes together, micro-batch by micro-batch.
    """
    numbers = _numbered(shape[:-1])
    slices: Any = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in slices for row in numbers[index[:-1]].ravel().tolist()})


def put_batch(
    batch: Mapping[str, np.ndarray],
    rows: Sequence[int],
    sharding: NamedSharding,
    lead: tuple[int, ...],
    order: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """A process's rows as its part of the global arrays.

    Args:
        batch: arrays [len(rows), S], row i being global row ``rows[i]``.
        lead: the arrays' leading axes: (rows,) or (micro-batches, rows).
        order: the token that stands at each place of a row; default: its own.
    """
    numbers = _numbered(lead)
    place_of = {row: i for i, row in enumerate(rows)}

    def put(array: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            wanted = numbers[index[:-1]]
            own = np.array([place_of[row] for row in wanted.ravel().tolist()])
            tokens = np.arange(array.shape[1]) if order is None else order
            return array[np.ix_(own, tokens[index[-1]])].reshape(*wanted.shape, -1)

        return jax.make_array_from_callback((*lead, array.shape[1]), sharding, piece)

    return {name: put(array) for name, array in batch.items()}


def _numbered(lead: tuple[int, ...]) -> np.ndarray:
    return np.arange(prod(lead)).reshape(lead)


def batch_sharding(rules: AxisRules, mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of [A, B / A, S] arrays: micro-batches are whole, over pipeline stages too."""
    return NamedSharding(mesh, rules.spec(None, "batch", "seq"))
