"""Device meshes: six named axes, always explicit; and programs on them."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import prod
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import jax
from jax.sharding import AxisType, Mesh, auto_axes

from maxlm.config import Config, MaxlmError
from maxlm.sharding.links import arrange_devices

P = ParamSpec("P")
T = TypeVar("T")
# Outermost (slowest links) first: `tensor` neighbours sit next to each other.
MeshAxis = Literal["stage", "data", "fsdp", "expert", "context", "tensor"]
MESH_AXES: tuple[str, ...] = get_args(MeshAxis)
# Those that split parameters; the others only split activations.
PARAMETER_AXES = ("stage", "fsdp", "expert", "tensor")


class MeshConfig(Config):
    """Number of devices along each mesh axis. One axis may be -1: whatever remains.

    One field for every one of ``MESH_AXES``.
    """

    data: int = 1
    """Replicas of the parameters, each with its share of the batch."""
    fsdp: int = -1
    """Shards of the parameters *and* of the batch (ZeRO-3)."""
    expert: int = 1
    """Shards of the experts of a mixture-of-experts layer."""
    context: int = 1
    """Shards of the sequence."""
    tensor: int = 1
    """Shards of heads, FFN and vocabulary; needs the fastest links."""
    stage: int = 1
    """Pipeline stages, each with its share of the layers."""


def parse_mesh(text: str) -> MeshConfig:
    """Parses ``"fsdp=64,tensor=4"`` to a config; axes left out have size 1. Raises
    MaxlmError: malformed text, or an axis that does not exist."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise MaxlmError(
                f"unknown mesh axis '{axis}'",
                where="--mesh",
                fix=f"use {', '.join(MESH_AXES)}",
            )
        if axis in sizes:
            raise MaxlmError(
                f"axis '{axis}' is given twice",
                where="--mesh",
                fix="give each axis once",
            )
        if not size.isdecimal() or int(size) < 1:
            raise MaxlmError(
                f"'{part}' is not AXIS=SIZE",
                where="--mesh",
                fix="write fsdp=8,tensor=2",
            )
        sizes[axis] = int(size)
    return MeshConfig(**{"fsdp": 1, **sizes})


def fold_for_generation(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the mesh of the same devices on which a run generates: what splits layers
    or sequences, which generation cannot, splits the batch in their place."""
    num_folded = sizes["context"] * sizes["stage"]
    data = sizes["data"] * num_folded
    return {**sizes, "data": data, "context": 1, "stage": 1}


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of every axis, in mesh order, for a number of devices. Raises
    MaxlmError: two axes are -1, a size is below 1, or the product is not
    ``num_devices``."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    description = ", ".join(
        f"{axis}={size}" for axis, size in sizes.items() if size != 1
    )
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise MaxlmError(
                f"mesh.{axis}={size}",
                where="mesh",
                fix="use a size ≥ 1, or -1 for the rest",
            )
    free_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(free_axes) > 1:
        raise MaxlmError(
            f"{' and '.join(free_axes)} are both -1",
            where="mesh",
            fix="leave one of them at -1",
        )
    fixed_size = prod(size for size in sizes.values() if size != -1)
    if free_axes and num_devices % fixed_size == 0:
        sizes[free_axes[0]] = num_devices // fixed_size
    elif free_axes or fixed_size != num_devices:
        needed = f"a multiple of {fixed_size}" if free_axes else str(fixed_size)
        raise MaxlmError(
            f"{description or 'all axes 1'} needs {needed} devices, {num_devices} here",
            where="mesh",
            fix=f"set the axes so that their product is {num_devices}, or one of them "
            "to -1",
        )
    return sizes


def count_min_devices(config: MeshConfig) -> int:
    """Returns the least number of devices a mesh can have: an axis of -1 counts as
    1."""
    return prod(max(getattr(config, axis), 1) for axis in MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns an explicit mesh over ``devices`` (default: all), laid out along the
    hardware's links; see ``maxlm.sharding.links``."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    axis_types = (AxisType.Explicit,) * len(sizes)
    return Mesh(arrange_devices(sizes, devices), tuple(sizes), axis_types)


def jit_sharded(function: Callable[P, T], shardings: object) -> Callable[P, T]:
    """Jits ``function`` so that every output is computed in shards, never whole on a
    device.

    Under an explicit mesh, values made from nothing are replicated by their type: with
    plain ``out_shardings`` each device would make every array whole and cut it at the
    end. Here the compiler lays out the computation, from the outputs backwards.

    Args:
        function: takes replicated arguments (a random key).
        shardings: one for every output, on the mesh in use (``jax.set_mesh``).
    """
    return jax.jit(auto_axes(function, out_sharding=shardings), out_shardings=shardings)


def bind_mesh(mesh: Mesh, function: Callable[P, T]) -> Callable[P, T]:
    """Wraps ``function`` with ``mesh`` as JAX's current one, which layers read while
    being traced. ``__wrapped__`` is ``function`` itself, say to lower it."""

    @wraps(function)
    def call_under_mesh(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call_under_mesh
