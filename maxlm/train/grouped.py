"""Layers on disk are [layers, ...]; a circular pipeline holds them as [groups, layers/groups, ...].

Both orders are the same, so that going from one to the other is a reshape; only the devices that
hold a layer change.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.sharding import bind_mesh, jit_sharded

Groups = Mapping[str, tuple[int, ...]]
"""Of each parameter held in groups, by canonical name: (groups, layers a group)."""


def is_grouped(name: str, shape: tuple[int, ...], groups: Groups) -> bool:
    """Whether an array of a state is such a parameter, or belongs to one."""
    owner = next((own for own in groups if f".{name}".endswith(f".{own}")), None)
    return owner is not None and shape[:2] == groups[owner]


def flatten_groups(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a grouped array as it is written and read."""
    old: Any = leaf.sharding
    sharding = old
    if isinstance(old, NamedSharding):
        sharding = NamedSharding(old.mesh, PartitionSpec(*old.spec[1:]))
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def reshape_arrays(
    arrays: Mapping[str, jax.Array], want: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Arrays in other shapes of the same order, in place on their devices.

    One program for all: hosts would run several in different orders, and wait for each other.
    """
    if not arrays:
        return {}
    shapes = {name: want[name].shape for name in arrays}
    shardings: Any = {name: want[name].sharding for name in arrays}

    def reshape(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: array.reshape(shapes[name]) for name, array in arrays.items()}

    mesh = getattr(next(iter(shardings.values())), "mesh", None)
    if mesh is None:
        return reshape(dict(arrays))
    return bind_mesh(mesh, jit_sharded(reshape, shardings))(dict(arrays))
