"""Layers on disk are [layers, ...]; a circular pipeline holds them as [groups, layers/groups, ...].

Both orders are the same, so that going from one to the other is a reshape; only the devices that
hold a layer change.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.sharding import jit_in_place, on_mesh

Groups = Mapping[str, tuple[int, ...]]
"""Of each parameter held in groups, by canonical name: (groups, layers a group)."""


def is_grouped(name: str, shape: tuple[int, ...], groups: Groups) -> bool:
    """Whether an array of a state is such a parameter, or belongs to one."""
    owner = next((own for own in groups if f".{name}".endswith(f".{own}")), None)
    return owner is not None and shape[:2] == groups[owner]


def on_disk(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a grouped array as it is written and read."""
    old: Any = leaf.sharding
    sharding = old
    if isinstance(old, NamedSharding):
        sharding = NamedSharding(old.mesh, PartitionSpec(*old.spec[1:]))
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def reshaped(x: jax.Array, want: jax.ShapeDtypeStruct) -> jax.Array:
    """An array in another shape of the same order, in place on its devices."""
    reshape = jit_in_place(lambda x: x.reshape(want.shape), want.sharding)
    sharding: Any = want.sharding
    mesh = getattr(sharding, "mesh", None)
    return on_mesh(mesh, reshape)(x) if mesh is not None else x.reshape(want.shape)
