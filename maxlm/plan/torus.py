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
    coords = np.array([device.coords for device in grid.ravel()])
    coords = coords.reshape(*grid.shape, len(_DIMENSIONS))
    dimensions = {}
    for mesh_dim, axis in enumerate(mesh_sizes):
        if mesh_sizes[axis] == 1:
            continue
        along = np.moveaxis(coords, mesh_dim, 0)
        # Which coordinate of any device differs from that of the first along this axis.
        all_but_coords = tuple(range(along.ndim - 1))
        differs = (along != along[:1]).any(axis=all_but_coords)
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
    missing_dimensions = 3 - len(topology.shape)
    x_side, y_side, z_side = (*topology.shape, *[1] * missing_dimensions)
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
        _PlacedDevice(
            id=number,
            coords=(x, y, z),
            core_on_chip=core,
            slice_index=slice_index,
            device_kind=kind,
        )
        for number, (slice_index, z, y, x, core) in enumerate(places)
    ]
