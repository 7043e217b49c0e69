"""Programs on a mesh, and arrays made there from nothing: random values, zeros."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.sharding import Mesh, auto_axes


def jit_sharded(function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """``function`` jitted so that every output is computed in its shards, never whole on a device.

    Under an explicit mesh, values made from nothing are replicated by their type: with plain
    ``out_shardings`` each device would make every array whole and cut it at the end. Here the
    compiler lays out the computation, from the outputs backwards.

    Args:
        function: takes replicated arguments (a random key).
        shardings: one for every output, on the mesh in use (``jax.set_mesh``).
    """
    return jax.jit(auto_axes(function, out_sharding=shardings), out_shardings=shardings)


def bind_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``mesh`` as JAX's current one, which layers read while being traced.

    Not for use within a trace; ``__wrapped__`` is ``function`` itself, say to lower it.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call
