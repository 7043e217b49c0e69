"""The order of devices in a mesh: the busiest axes get the fastest links."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from maxlm.config import MaxlmError

# Axes that may lie over the network between TPU slices, the most willing first: `data`
# crosses it once a step, `stage` with one activation a micro-batch.
BETWEEN_SLICES = ("data", "stage")


def arrange_devices(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Returns devices in the shape of a mesh, ``sizes`` outermost first.

    A TPU slice is laid along its torus (``mesh_utils``), several slices along `data`,
    else `stage`; GPUs host by host, so that `tensor`, innermost, stays within one.
    Raises MaxlmError: slices that neither `data` nor `stage` divides over; `tensor`
    across GPU hosts; axes that a torus has no room for."""
    if devices[0].platform == "gpu":
        return _arrange_gpus(sizes, devices)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    slices_per_axis = count_slices_per_axis(sizes, num_slices)
    sizes_in_slice = tuple(
        size // slices_per_axis[axis] for axis, size in sizes.items()
    )

    # Dimensions of the torus are shared only by axes that are no product of whole ones.
    for allow_split_physical_axes in (False, True):
        try:
            if num_slices == 1:
                return mesh_utils.create_device_mesh(
                    sizes_in_slice,
                    devices,
                    allow_split_physical_axes=allow_split_physical_axes,
                )
            return mesh_utils.create_hybrid_device_mesh(
                sizes_in_slice,
                tuple(slices_per_axis.values()),
                devices,
                allow_split_physical_axes=allow_split_physical_axes,
            )
        # JAX raises any of these where it finds no way to lay out the axes.
        except (NotImplementedError, TypeError, ValueError):
            continue
    axes = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    raise MaxlmError(
        f"the mesh {axes} cannot be laid along this torus",
        fix="choose axes whose sizes are products of its sides, or of parts of them",
    )


def _arrange_gpus(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges GPUs host by host."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    num_hosts = len({device.process_index for device in devices})
    check_tensor_within_host(sizes, len(devices) // num_hosts)
    return np.array(ordered, object).reshape(tuple(sizes.values()))


def count_slices_per_axis(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """Returns the number of slices that each mesh axis is split over; raises MaxlmError
    where neither `data` nor `stage` divides over them."""
    slices_per_axis = dict.fromkeys(sizes, 1)
    if num_slices == 1:
        return slices_per_axis
    for axis in BETWEEN_SLICES:
        if sizes[axis] % num_slices == 0:
            return slices_per_axis | {axis: num_slices}
    raise MaxlmError(
        f"{num_slices} slices, but neither data={sizes['data']} nor "
        f"stage={sizes['stage']} divides over them",
        where="mesh",
        fix=f"set mesh.data to a multiple of {num_slices}: only it or stage may cross "
        "slices",
    )


def check_tensor_within_host(sizes: Mapping[str, int], gpus_per_host: int) -> None:
    """Raises MaxlmError where the axis `tensor` does not stay within a host."""
    tensor = sizes["tensor"]
    if gpus_per_host % tensor:
        raise MaxlmError(
            f"tensor={tensor} would lie across hosts of {gpus_per_host} GPUs",
            where="mesh.tensor",
            fix=f"use a divisor of {gpus_per_host}",
        )
