"""The position of a mesh on a machine that is not here: axes along the dimensions of a torus.

The layout is that of a run (``sharding/links.py: arrange_devices``), for devices that are
coordinates alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from maxlm.plan.hardware import CHIPS
from maxlm.plan.topology import Topology
from maxlm.sharding.links import arrange_devices

_NAMES = "xyz"


@dataclass(frozen=True)
class _Place:
    """A device as the layout reads it."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int
    process_index: int


def _places(topology: Topology) -> list[_Place]:
    kind = CHIPS[topology.kind].device_kinds[0]
    sides = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    cores = 2 if topology.kind == "tpu7x" else 1
    where = product(range(topology.slices), *(range(n) for n in reversed(sides)), range(cores))
    return [
        _Place(i, "tpu", kind, (x, y, z), core, part, part)
        for i, (part, z, y, x, core) in enumerate(where)
    ]


def list_torus_dimensions(topology: Topology, sizes: Mapping[str, int]) -> dict[str, str]:
    """For each mesh axis of more than one device, the dimensions of a TPU's torus that neighbours
    along it differ in, as ``x·y``; "" for one that only crosses slices.

    Raises:
        MaxlmError: a mesh that the layout cannot place.
    """
    grid = arrange_devices(sizes, _places(topology))
    coords = np.array([place.coords for place in grid.ravel()]).reshape(*grid.shape, 3)
    found = {}
    for dim, axis in enumerate(sizes):
        if sizes[axis] == 1:
            continue
        along = np.moveaxis(coords, dim, 0)
        differs = (along != along[:1]).any(axis=tuple(range(along.ndim - 1)))
        found[axis] = "·".join(name for name, yes in zip(_NAMES, differs, strict=True) if yes)
    return found
