"""Finds the devices a collective joins, and the mesh axes they lie along.

Ids in a compiled program number its mesh's devices in order (``mesh.devices.flat``), so
that sizes are enough for axes.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.plan.compiled.hlo import Instruction

# The printed forms, which parse_replica_groups() shows.
_ID_LISTS = r"((?:\{[\d, ]*\},?\s*)*)"
_EXPLICIT = re.compile(rf"replica_groups=\{{{_ID_LISTS}\}}")
_PAIRS = re.compile(rf"source_target_pairs=\{{{_ID_LISTS}\}}")
_ASSIGNED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]\s*(?:,\s*device_ids=\(([^{]*)\)\s*)?\s*\{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"([^',=\s]+)'?=(\d+)")
# Of the axes that a group spans: name, product of the factors before, size of the part.
_SPANNED_AXIS = re.compile(r"([^',:()\s]+)'?(?::\((\d+)\)(\d+))?")
_COUNTED_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


def find_device_group(
    instruction: Instruction, sizes: Mapping[str, int]
) -> tuple[str, int]:
    """Returns a collective's reach in a mesh of ``sizes``, outermost axis first: the
    axes along which members differ, joined by "+" ("" for a device on its own), and the
    members of one group; of a permute 2, or 1 where no data moves."""
    text = instruction.attributes
    start = max(text.find("replica_groups="), text.find("source_target_pairs="))
    printed_groups = text[start:] if start >= 0 else ""
    return _find_group(printed_groups, tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _find_group(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    """Does what :func:`find_device_group` says, for the printed groups alone."""
    pairs = _PAIRS.match(text)
    if pairs:
        # A device that sends to itself moves nothing.
        moves: list[list[int]] = []
        for source, target in _parse_id_lists(pairs[1]):
            if source != target:
                moves.append([source, target])
        num_members = 2 if moves else 1
        return _find_varying_axes(moves, sizes), num_members
    devices = prod(size for _, size in sizes)
    groups = parse_replica_groups(text, devices)
    num_members = max(len(group) for group in groups)
    return _find_varying_axes(groups, sizes), num_members


def parse_replica_groups(text: str, devices: int) -> list[list[int]]:
    """Parses ``replica_groups=...`` in any printed form as lists of ids.

    Forms: ``{{0,1},{2,3}}``; ``{}`` or absent for all devices together;
    ``[2,4]<=[4,2]T(1,0)``, ids counted up in the shape on the right, transposed, and
    read in rows of the shape on the left; ``mesh['a'=2,'b'=4] {'b'}``, the axes of a
    mesh (not by their JAX names) that a group spans, where ``'b':(2)2`` is a part of
    one (of b = 2 · 2 the factor 2 that comes after a factor of 2), and
    ``device_ids=(...)`` between the two gives the ids where they do not just count up.
    """
    all_devices = [list(range(devices))]
    explicit = _EXPLICIT.match(text)
    if explicit:
        groups = _parse_id_lists(explicit[1])
        return groups or all_devices
    assigned = _ASSIGNED.match(text)
    if assigned:
        shape_text, base_text, order_text = assigned.groups()
        shape = _parse_integers(shape_text)
        return _count_up_ids(shape, base_text, order_text).tolist()
    mesh = _MESH.match(text)
    if mesh:
        axes, device_ids, spanned = mesh.groups()
        return _parse_mesh_groups(axes, device_ids, spanned)
    if text.startswith("replica_groups="):
        raise ValueError(f"unknown form: {text[:120]}")
    return all_devices


def _count_up_ids(shape: Sequence[int], base: str, order: str | None) -> np.ndarray:
    """Returns ids counted up in the shape ``base``, transposed, and read in
    ``shape``."""
    dims = _parse_integers(base)
    ids = np.arange(np.prod(dims)).reshape(dims)
    if order:
        ids = ids.transpose(_parse_integers(order))
    return ids.reshape(shape)


class _AxisPart(NamedTuple):
    """A factor of a mesh axis that a group spans."""

    axis: str
    before: int
    """Product of the axis's factors before it: devices differ along it in
    ``[before, before * size)``."""
    size: int

    @property
    def end(self) -> int:
        """Product of the axis's factors up to it, itself included."""
        return self.before * self.size


def _parse_mesh_groups(
    axes: str, device_ids: str | None, spanned: str
) -> list[list[int]]:
    """Parses the three texts of ``mesh[axes], device_ids=(device_ids) {spanned}``."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    parts: list[_AxisPart] = []
    for name, before, size in _SPANNED_AXIS.findall(spanned):
        if size:
            parts.append(_AxisPart(name, int(before), int(size)))
        else:  # the whole axis
            parts.append(_AxisPart(name, 1, sizes[name]))

    # Every axis is cut where one of the parts that a group spans begins or ends, so
    # that a dimension lies either within a group or across groups.
    dims: list[int] = []
    # By the axis and the product of its factors before: the dimension's place.
    dim_of_cut: dict[tuple[str, int], int] = {}
    for axis, size in sizes.items():
        cuts = {1, size}
        for part in parts:
            if part.axis == axis:
                cuts |= {part.before, part.end}
        for low, high in pairwise(sorted(cuts)):
            dim_of_cut[axis, low] = len(dims)
            dims.append(high // low)

    # The dimensions that a group spans, those of its first part first.
    spanned_dims: list[int] = []
    for part in parts:
        # Cuts of an axis are in ascending order.
        for (axis, low), dim in dim_of_cut.items():
            if axis == part.axis and part.before <= low < part.end:
                spanned_dims.append(dim)

    # Ids in the shape of the dimensions.
    counted = _COUNTED_IDS.fullmatch(device_ids or "")
    if counted:
        ids = _count_up_ids(dims, counted[1], counted[2])
    elif device_ids:
        ids = np.reshape(_parse_integers(device_ids), dims)
    else:
        ids = np.arange(np.prod(dims)).reshape(dims)

    # [other dimensions..., spanned dimensions...] -> [groups, members]
    other_dims = [dim for dim in range(len(dims)) if dim not in spanned_dims]
    num_members = prod(dims[dim] for dim in spanned_dims)
    ids = ids.transpose(*other_dims, *spanned_dims)
    return ids.reshape(-1, num_members).tolist()


def _find_varying_axes(
    groups: Sequence[Sequence[int]], sizes: tuple[tuple[str, int], ...]
) -> str:
    """Returns the mesh axes along which members of a group differ, joined by "+"."""
    names = [name for name, _ in sizes]
    dims = [size for _, size in sizes]
    varies = np.zeros(len(dims), bool)
    for members in groups:
        # [mesh axes, members]
        coordinates = np.stack(np.unravel_index(np.array(members), dims))
        first_member = coordinates[:, :1]
        varies |= (coordinates != first_member).any(axis=1)
    varying_names = [
        name for name, is_varying in zip(names, varies, strict=True) if is_varying
    ]
    return "+".join(varying_names)


def _parse_id_lists(text: str) -> list[list[int]]:
    """Parses ``{0,1},{2,3}``."""
    return [_parse_integers(inner) for inner in re.findall(r"\{([\d, ]*)\}", text)]


def _parse_integers(text: str) -> list[int]:
    """Returns the numbers in a text, whatever stands between them."""
    return [int(digits) for digits in re.findall(r"\d+", text)]
