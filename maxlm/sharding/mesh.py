"""Device meshes: six named axes, always explicit; and programs on them."""

from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from typing import Any, Literal, get_args

import jax
from jax.sharding import AxisType, Mesh, auto_axes

from maxlm.config import Config, MaxlmError
from maxlm.sharding.links import arrange_devices

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
    sizes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            fix = f"use {', '.join(MESH_AXES)}"
            raise MaxlmError(f"unknown mesh axis '{axis}'", where="--mesh", fix=fix)
        if axis in sizes:
            fix = "give each axis once"
            raise MaxlmError(f"axis '{axis}' is given twice", where="--mesh", fix=fix)
        if not size.isdecimal() or int(size) < 1:
            fix = "write fsdp=8,tensor=2"
            raise MaxlmError(f"'{part}' is not AXIS=SIZE", where="--mesh", fix=fix)
        sizes[axis] = int(size)
    return MeshConfig(**{"fsdp": 1, **sizes})


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of every axis, in mesh order, for a number of devices. Raises
    MaxlmError: two axes are -1, a size is below 1, or the product is not
    ``num_devices``."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    described = (
        ", ".join(f"{a}={n}" for a, n in sizes.items() if n != 1) or "all axes 1"
    )
    free = [axis for axis, n in sizes.items() if n == -1]
    for axis, n in sizes.items():
        if n < 1 and n != -1:
            fix = "use a size ≥ 1, or -1 for the rest"
            raise MaxlmError(f"mesh.{axis}={n}", where="mesh", fix=fix)
    if len(free) > 1:
        fix = "leave one of them at -1"
        raise MaxlmError(f"{' and '.join(free)} are both -1", where="mesh", fix=fix)
    fixed = prod(n for n in sizes.values() if n != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        wanted = f"a multiple of {fixed}" if free else str(fixed)
        what = f"{described} needs {wanted} devices, {num_devices} here"
        fix = (
            f"set the axes so that their product is {num_devices}, or one of them to -1"
        )
        raise MaxlmError(what, where="mesh", fix=fix)
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
    return Mesh(
        arrange_devices(sizes, devices), tuple(sizes), (AxisType.Explicit,) * len(sizes)
    )


def jit_sharded(function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
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


def bind_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``function`` with ``mesh`` as JAX's current one, which layers read while
    being traced. ``__wrapped__`` is ``function`` itself, say to lower it."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call
