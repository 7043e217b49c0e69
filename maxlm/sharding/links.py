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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "gpu":
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        hosts = len({device.process_index for device in devices})
        check_tensor_within_host(sizes, len(devices) // hosts)
        return np.array(ordered, object).reshape(tuple(sizes.values()))
    outer = count_slices_per_axis(sizes, slices)
    inner = tuple(n // outer[axis] for axis, n in sizes.items())

    # Dimensions of the torus are shared only by axes that are no product of whole ones.
    for shared in (False, True):
        options: dict[str, Any] = {"allow_split_physical_axes": shared}
        try:
            if slices == 1:
                return mesh_utils.create_device_mesh(inner, devices, **options)
            between = tuple(outer.values())
            return mesh_utils.create_hybrid_device_mesh(
                inner, between, devices, **options
            )
        except (
            NotImplementedError,
            TypeError,
            ValueError,
        ):  # as JAX words that it finds no way
            continue
    axes = ", ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
    fix = "choose axes whose sizes are products of its sides, or of parts of them"
    raise MaxlmError(f"the mesh {axes} cannot be laid along this torus", fix=fix)


def count_slices_per_axis(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """Returns the number of slices that each mesh axis is split over; raises MaxlmError
    where neither `data` nor `stage` divides over them."""
    outer = dict.fromkeys(sizes, 1)
    if num_slices == 1:
        return outer
    for axis in BETWEEN_SLICES:
        if sizes[axis] % num_slices == 0:
            return outer | {axis: num_slices}
    what = f"{num_slices} slices, but neither data={sizes['data']} nor stage={sizes['stage']} "
    what += "divides over them"
    fix = f"set mesh.data to a multiple of {num_slices}: only it or stage may cross slices"
    raise MaxlmError(what, where="mesh", fix=fix)


def check_tensor_within_host(sizes: Mapping[str, int], gpus_per_host: int) -> None:
    """Raises MaxlmError where the axis `tensor` does not stay within a host."""
    if gpus_per_host % sizes["tensor"]:
        what = (
            f"tensor={sizes['tensor']} would lie across hosts of {gpus_per_host} GPUs"
        )
        raise MaxlmError(
            what, where="mesh.tensor", fix=f"use a divisor of {gpus_per_host}"
        )
