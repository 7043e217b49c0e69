"""Programs on shards whose gradient follows from what one device computes.

``local.py`` says that JAX never differentiates a program on shards, and that whoever
runs one writes its gradient as another. Here that other program is made: each device
differentiates its own part of the computation, and gradients of operands that are whole
on several devices are summed over these.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from maxlm.parallel.layers import PyTree, Residuals, split_residuals
from maxlm.parallel.local import Axes, map_shards, parse_spec

ShardFunction = Callable[[Any, Any], jax.Array]
"""(operands, context) -> y, of one device's shards."""
ArrangeFn = Callable[[Any], Any]
"""Operands of one device's shards -> the same numbers, as its function reads them."""


def _leave_as_is(operands: PyTree) -> PyTree:
    return operands


class ShardSpecs(NamedTuple):
    """Layouts of a program's arguments and of its result."""

    operands: PyTree
    """A spec for each array."""
    context: PyTree
    result: PartitionSpec


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def run_on_shards(
    function: ShardFunction,
    operands: PyTree,
    context: PyTree,
    specs: ShardSpecs,
    saved_name: str | None = None,
    arrange: ArrangeFn = _leave_as_is,
) -> jax.Array:
    """Runs ``function(operands, context)`` on each device's shards; reverse-mode
    differentiable in ``operands``.

    What a device's backward pass needs stays on the device. The function may exchange
    arrays with others by ``all_gather`` and ``ppermute``, whose transposes are right on
    shards (that of ``psum`` is not).

    Args:
        function: its result is another on all devices over which any operand is split.
        operands: a tree of arrays with gradients.
        context: a tree of arrays without.
        saved_name: the name by which remat policies keep the result, and what the
            backward pass needs beside operands and context (``models/remat.py``). A
            policy that keeps these does not run the function again.
        arrange: applied to the operands first, such as reshapes. The backward pass does
            it again, where it would keep operands a second time as the function reads
            them.
    """
    del saved_name

    def run_shard(operands, context):
        return function(arrange(operands), context)

    run = map_shards(run_shard, (specs.operands, specs.context), specs.result)
    return run(operands, context)


def _forward(function, operands, context, specs, saved_name, arrange):
    traced: list[Residuals] = []

    def run_shard_forward(operands, context):
        arranged = arrange(operands)
        y, backward = jax.vjp(lambda arranged: function(arranged, context), arranged)
        residuals, local_arrays = split_residuals(backward, (arranged, context))
        traced.append(residuals)
        # An axis of devices, each with its own.
        return y, tuple(array[None] for array in local_arrays)

    out_specs = specs.result, PartitionSpec(_find_free_axes())
    run = map_shards(run_shard_forward, (specs.operands, specs.context), out_specs)
    y, local_arrays = run(operands, context)
    if saved_name is not None:
        # Named here and not outside, where only the result could be.
        y, local_arrays = jax.tree.map(
            lambda a: checkpoint_name(a, saved_name), (y, local_arrays)
        )
    return y, (operands, context, local_arrays, traced[-1])


def _backward(function, specs, saved_name, arrange, saved, d_y):
    del function, saved_name
    operands, context, local_arrays, residuals = saved
    free_axes = _find_free_axes()
    all_split_axes: set[str] = set()
    for spec in jax.tree.leaves(specs.operands):
        all_split_axes |= _list_axes(spec)

    def sum_copies(spec: PartitionSpec, gradient: jax.Array) -> jax.Array:
        """Sums a gradient over devices with the same part of its operand."""
        copied_axes = all_split_axes - _list_axes(spec)
        axes = tuple(axis for axis in free_axes if axis in copied_axes)
        return lax.psum(gradient, axes) if axes else gradient

    def run_shard_backward(operands, context, local_arrays, d_y):
        # Residuals are joined with the operands as the function read them, which are
        # made again here; ``undo`` takes their gradients back to the operands.
        arranged, undo = jax.vjp(arrange, operands)
        backward = residuals.join(
            (arranged, context), [array[0] for array in local_arrays]
        )
        (gradients,) = undo(*backward(d_y))
        return jax.tree.map(sum_copies, specs.operands, gradients)

    in_specs = specs.operands, specs.context, PartitionSpec(free_axes), specs.result
    run = map_shards(run_shard_backward, in_specs, specs.operands)
    return run(operands, context, local_arrays, d_y), None


run_on_shards.defvjp(_forward, _backward)


def _find_free_axes() -> Axes:
    """Returns the mesh axes over which a program here is mapped, in the mesh's
    order."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)


def _list_axes(spec: PartitionSpec) -> set[str]:
    """Returns the mesh axes that split any dimension."""
    return {axis for axes in parse_spec(spec, len(spec)) for axis in axes}
