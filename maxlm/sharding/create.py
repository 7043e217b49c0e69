"""Programs on a mesh, and arrays made there from nothing: random values, zeros."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.sharding import Mesh, auto_axes


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with ``mesh`` as JAX's current one, which layers read while being traced.

    Not for use within a trace; ``__wrapped__`` is ``function`` itself, say to lower it.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **kwargs)

    return call


def jit_on_mesh(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` compiled for ``mesh`` at its first call, and run there.

    Args:
        options: of ``jax.jit``, except its ``compiler_options``.
    """
    compiler_options = {}
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        # By default XLA:CPU starts whatever is ready, on several threads: virtual devices came to
        # collectives in different orders and waited for ever (1F1B pipelines, within 100 steps).
        compiler_options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return on_mesh(mesh, jax.jit(function, compiler_options=compiler_options, **options))


def jit_in_place(mesh: Mesh, function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """``function`` compiled so that each output is computed in its shards, never whole on a device.

    Under an explicit mesh, values made from nothing are replicated by their type: with plain
    ``out_shardings`` each device would make every array whole and cut it at the end. Here the
    compiler lays out the computation, from the outputs backwards.

    Args:
        function: takes replicated arguments (a random key).
        shardings: one on ``mesh`` for every output.
    """
    in_place = auto_axes(function, out_sharding=shardings)
    return jit_on_mesh(mesh, in_place, out_shardings=shardings)
