"""Programs written for one device's shards, and the collectives between layouts.

The only place that calls ``shard_map``. Two rules hold for everything run through it:

- JAX never differentiates it. Whoever runs a program on shards writes its gradient as
  another one (``jax.custom_vjp``), and so decides what crosses the wire: JAX's own
  transposes all-reduce whole gradients where a reduce-scatter would do, and fail inside
  another shard_map (jax 0.10–0.12).
- Programs do not ask for their place (``lax.axis_index`` fails there too): they take
  :func:`axis_indices` as an argument.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, reshard

from pallas_kernels.chips import get_platform

# Devices over which XLA:TPU keeps a reduce-scatter, whatever the torus.
STEP = 16
# The last dimension of a TPU's tiles.
LANES = 128

T = TypeVar("T")
Axes = tuple[str, ...]
Dims = tuple[Axes, ...]
"""The mesh axes that split each dimension of an array."""
DeviceGroups = list[list[int]]
"""Groups of devices, by their numbers along some axes, that exchange among
themselves."""


class SplitArray(NamedTuple):
    """An array, and how its dimensions are split over devices."""

    value: jax.Array
    axes: tuple[str | None, ...]
    """Logical axes: of all dimensions of a parameter; of those behind the first two of
    tokens, [B, S] or [D, S]."""


def map_shards(
    function: Callable[..., T], in_specs: Any, out_specs: Any, axes: Axes = ()
) -> Callable[..., T]:
    """Maps ``function`` over each device's shards, manual over ``axes``; default: every
    mesh axis that is not so yet. ``in_specs`` and ``out_specs`` are layouts of
    arguments and results, on these axes. A result that a spec leaves whole over an axis
    must be equal along it; nothing checks."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(axes) or set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=manual,
        check_vma=False,
    )


def axis_indices(axes: Axes) -> jax.Array:
    """Returns each device's number along ``axes``, int32 [ways]: pass it with the spec
    ``P(axes)`` and read element 0 of the shard."""
    return jnp.arange(
        axis_size(axes), dtype=jnp.int32, out_sharding=PartitionSpec(axes or None)
    )


def axis_size(axes: Sequence[str]) -> int:
    """Returns the number of devices along mesh axes together."""
    shape = jax.sharding.get_abstract_mesh().shape
    return prod(shape[axis] for axis in axes)


def get_layout(x: jax.Array) -> Dims:
    """Returns the mesh axes that split each dimension of an array, read from its
    type."""
    return parse_spec(jax.typeof(x).sharding.spec, x.ndim)


def parse_spec(spec: PartitionSpec, ndim: int) -> Dims:
    """Returns a spec as one tuple of mesh axes for each dimension."""
    dims: list[Axes] = []
    for axes in spec:
        dims.append((axes,) if isinstance(axes, str) else tuple(axes or ()))
    num_unnamed = ndim - len(dims)  # a spec may end early; the rest is whole
    return (*dims, *((),) * num_unnamed)


def make_spec(dims: Sequence[Axes]) -> PartitionSpec:
    """Returns the spec of a tuple of mesh axes for each dimension; inverts
    :func:`parse_spec`."""
    return PartitionSpec(*(axes or None for axes in dims))


def gather(x: jax.Array, have: Sequence[Axes], want: Sequence[Axes]) -> jax.Array:
    """Gathers shards from layout ``have`` to layout ``want``, whose axes begin
    ``have``'s in every dimension, over the other axes."""
    for dim, (have_axes, want_axes) in enumerate(zip(have, want, strict=True)):
        gathered_axes = _remove_prefix(have_axes, want_axes)
        if gathered_axes:
            x = _gather(x, gathered_axes, dim)
    return x


def gather_to_spec(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Moves an array to another layout: by :func:`gather`, which on a TPU stays a
    gather, where that splits less of the same axes; otherwise by the compiler. Not
    differentiable."""
    have = get_layout(x)
    want = parse_spec(spec, x.ndim)
    splits_less = all(
        have_axes[: len(want_axes)] == want_axes
        for have_axes, want_axes in zip(have, want, strict=True)
    )
    if have == want or not splits_less:
        return reshard(x, spec)
    run = map_shards(lambda x: gather(x, have, want), make_spec(have), make_spec(want))
    return run(x)


def reduce(
    x: jax.Array, partial: Axes, have: Sequence[Axes], want: Sequence[Axes]
) -> jax.Array:
    """Sums shards over the ``partial`` axes, from layout ``have`` to ``want``.

    Each dimension of ``want`` begins with ``have``'s axes. What it adds is split off by
    a reduce-scatter; the other partial axes are all-reduced. An axis that ``want`` adds
    and along which x is equal rather than partial is scattered too, after division by
    its size.
    """
    unsummed = list(partial)
    for dim, (have_axes, want_axes) in enumerate(zip(have, want, strict=True)):
        added_axes = _remove_prefix(want_axes, have_axes)
        if not added_axes:
            continue
        # A scatter sums equal values too.
        num_equal = axis_size([axis for axis in added_axes if axis not in unsummed])
        if num_equal > 1:
            x = x / num_equal
        x = _scatter(x, added_axes, dim)
        unsummed = [axis for axis in unsummed if axis not in added_axes]
    return lax.psum(x, tuple(unsummed)) if unsummed else x


def _gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Gathers all shards of ``dim`` over ``axes``; see :func:`_group_two_steps`."""
    collect = partial(lax.all_gather, axis_name=axes, axis=dim, tiled=True)
    groups = _group_two_steps(axes)
    if groups is None:
        return collect(x)
    outer_groups, inner_groups = groups
    x = collect(x, axis_index_groups=inner_groups)
    return collect(x, axis_index_groups=outer_groups)


def _scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Returns the sum over ``axes``, split along ``dim``; see
    :func:`_group_two_steps`."""
    groups = _group_two_steps(axes)
    if groups is None:
        return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    outer_groups, inner_groups = groups
    scatter = partial(lax.psum_scatter, axis_name=axes, tiled=True)
    # Along the last dimension, shards narrower than a TPU's lanes would be all-reduced
    # after all; so are some matrices, or padded by up to a quarter, that are not in
    # rows of lanes.
    x = jnp.moveaxis(x, dim, 0)
    shape = x.shape
    if x.ndim == 2 and shape[1] % LANES == 0:
        x = x.reshape(shape[0], -1, LANES)
    x = scatter(x, axis_index_groups=outer_groups)
    if len(inner_groups[0]) > 2:
        x = scatter(x, axis_index_groups=inner_groups)
    else:  # scatters over pairs are padded; an exchange of halves is not
        halves = x.reshape(2, -1, *x.shape[1:])
        halves = lax.all_to_all(
            halves, axes, 0, 0, axis_index_groups=inner_groups, tiled=True
        )
        x = halves.sum(0)
    return jnp.moveaxis(x.reshape(-1, *shape[1:]), 0, dim)


def _group_two_steps(axes: Axes) -> tuple[DeviceGroups, DeviceGroups] | None:
    """Groups devices to gather or scatter over ``axes`` in two steps, where that is
    better: devices i·b + j of a·b as those of equal j (the outer groups), then those of
    equal i (the inner ones).

    Over more than one dimension of a torus XLA:TPU replaces reduce-scatters, and in
    three dimensions all-gathers too, by an all-reduce and a slice: twice the bytes
    (benchmarks/README.md). Two steps, each over fewer devices, stay what they are. A
    scatter over equal j gives device i·b + j the i-th part, one over equal i of that
    the j-th; a gather goes back the same way.
    """
    size = axis_size(axes)
    inner_size = size // STEP if size > STEP else 2
    if get_platform() != "tpu" or size <= 4 or size % inner_size:
        return None
    outer_groups = [list(range(j, size, inner_size)) for j in range(inner_size)]
    inner_groups = [list(range(i, i + inner_size)) for i in range(0, size, inner_size)]
    return outer_groups, inner_groups


def _remove_prefix(longer: Axes, shorter: Axes) -> Axes:
    """Returns the axes of ``longer`` behind those of ``shorter``, which it begins
    with."""
    if longer[: len(shorter)] != shorter:
        raise ValueError(f"{longer} does not begin with {shorter}")
    return longer[len(shorter) :]
