"""Where mesh axes lie in a TPU slice's torus."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from maxlm.plan.hardware import CHIPS
from maxlm.plan.topology import Topology
from maxlm.sharding.links import arrange_devices

_DIMENSIONS = ("x", "y", "z")


@dataclass(frozen=True)
class _PlacedDevice:
    """A TPU device that is not here, with all that JAX asks of one to lay a mesh along
    a torus."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int
    slice_index: int
    device_kind: str
    platform: str = "tpu"

    @property
    def process_index(self) -> int:
        return self.slice_index


def find_torus_dimensions(
    topology: Topology, mesh_sizes: Mapping[str, int]
) -> dict[str, str]:
    """Returns mesh axis → the dimensions of the torus in which neighbours along it
    differ, as ``x·y``, for each axis of several devices; "" for one that lies within
    chips or only crosses slices. The layout is the one that a run makes of such
    devices. Raises MaxlmError: the mesh cannot be laid along the torus.
    """
    grid = arrange_devices(mesh_sizes, _list_devices(topology))
    coords = np.array([device.coords for device in grid.ravel()]).reshape(
        *grid.shape, 3
    )
    dimensions = {}
    for dim, axis in enumerate(mesh_sizes):
        if mesh_sizes[axis] == 1:
            continue
        along = np.moveaxis(coords, dim, 0)
        differs = (along != along[:1]).any(axis=tuple(range(along.ndim - 1)))
        names = [
            name
            for name, is_other in zip(_DIMENSIONS, differs, strict=True)
            if is_other
        ]
        dimensions[axis] = "·".join(names)
    return dimensions


def _list_devices(topology: Topology) -> list[_PlacedDevice]:
    """Lists a machine's devices as JAX does: slice by slice, x fastest, a chip
    whole."""
    x_side, y_side, z_side = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    devices_per_chip = topology.devices_per_slice // (x_side * y_side * z_side)
    places = product(
        range(topology.slices),
        range(z_side),
        range(y_side),
        range(x_side),
        range(devices_per_chip),
    )
    kind = CHIPS[topology.kind].device_kinds[0]
    return [
        _PlacedDevice(number, (x, y, z), core, slice_index, kind)
        for number, (slice_index, z, y, x, core) in enumerate(places)
    ]
