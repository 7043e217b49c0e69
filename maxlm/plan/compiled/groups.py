"""Finds the devices a collective joins, and the mesh axes they lie along. Ids in a
compiled program number its mesh's devices in order (``mesh.devices.flat``), so that
sizes are enough for axes."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

import numpy as np

from maxlm.plan.compiled.hlo import Instruction

_EXPLICIT = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},?\s*)*)\}")
_ASSIGNED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]\s*(?:,\s*device_ids=\(([^{]*)\)\s*)?\s*\{([^}]*)\}"
)
_COUNTED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"([^',:()\s]+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d, ]*\},?\s*)*)\}")


def find_device_group(
    instruction: Instruction, sizes: Mapping[str, int]
) -> tuple[str, int]:
    """Returns a collective's reach in a mesh of ``sizes``, outermost axis first: the
    axes along which members differ, joined by "+" ("" for a device on its own), and the
    members of one group; of a permute 2, or 1 where no data moves."""
    text = instruction.attributes
    start = max(text.find("replica_groups="), text.find("source_target_pairs="))
    return _find_group(text[start:] if start >= 0 else "", tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _find_group(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    pairs = _PAIRS.match(text)
    if pairs:
        moves = [pair for pair in _lists(pairs[1]) if pair[0] != pair[1]]
        return _axes(moves, sizes), 2 if moves else 1
    groups = parse_replica_groups(text, prod(n for _, n in sizes))
    return _axes(groups, sizes), max(map(len, groups))


def parse_replica_groups(text: str, devices: int) -> list[list[int]]:
    """Parses ``replica_groups=...`` in any printed form as lists of ids.

    Forms: ``{{0,1},{2,3}}``; ``{}`` or absent for all devices together;
    ``[2,4]<=[4,2]T(1,0)``, ids counted up in the shape on the right, transposed, and
    read in rows of the shape on the left; ``mesh['a'=2,'b'=4] {'b'}``, the axes of a
    mesh (not by their JAX names) that a group spans, where ``'b':(2)2`` is a part of
    one (of b = 2 · 2 the factor 2 that comes after a factor of 2), and
    ``device_ids=(...)`` between the two gives the ids where they do not just count up.
    """
    explicit, assigned, mesh = (p.match(text) for p in (_EXPLICIT, _ASSIGNED, _MESH))
    if explicit:
        return _lists(explicit[1]) or [list(range(devices))]
    if assigned:
        return _iota(_integers(assigned[1]), assigned[2], assigned[3]).tolist()
    if mesh:
        return _mesh_groups(*mesh.groups())
    if text.startswith("replica_groups="):
        raise ValueError(f"unknown form: {text[:120]}")
    return [list(range(devices))]


def _iota(shape: Sequence[int], base: str, order: str | None) -> np.ndarray:
    dims = _integers(base)
    ids = np.arange(np.prod(dims)).reshape(dims)
    return (ids.transpose(_integers(order)) if order else ids).reshape(shape)


def _mesh_groups(axes: str, device_ids: str | None, spanned: str) -> list[list[int]]:
    sizes = {name: int(n) for name, n in re.findall(r"([^',=\s]+)'?=(\d+)", axes)}
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in _AXIS.findall(spanned)
    ]
    # Every axis is cut where one of the parts that a group spans begins or ends.
    dims: list[int] = []
    dim_of_part: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        axis_parts = [(before, n) for axis, before, n in parts if axis == name]
        starts = {before for before, _ in axis_parts}
        ends = {before * n for before, n in axis_parts}
        for low, high in pairwise(sorted({1, size} | starts | ends)):
            dim_of_part[name, low] = len(dims)
            dims.append(high // low)
    last = []
    for name, before, size in parts:
        inner = [
            (axis, low)
            for axis, low in dim_of_part
            if axis == name and before <= low < before * size
        ]
        last += [dim_of_part[part] for part in sorted(inner)]
    ids = np.arange(np.prod(dims)).reshape(dims)
    if counted := _COUNTED.fullmatch(device_ids or ""):
        ids = _iota(dims, counted[1], counted[2])
    elif device_ids:
        ids = np.reshape(_integers(device_ids), dims)
    first = [d for d in range(len(dims)) if d not in last]
    members = prod(dims[d] for d in last)
    return ids.transpose(*first, *last).reshape(-1, members).tolist()


def _axes(groups: Sequence[Sequence[int]], sizes: tuple[tuple[str, int], ...]) -> str:
    names, dims = zip(*sizes, strict=True)
    varies = np.zeros(len(dims), bool)
    for members in groups:
        places = np.stack(np.unravel_index(np.array(members), dims))
        varies |= (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, here in zip(names, varies, strict=True) if here)


def _lists(text: str) -> list[list[int]]:
    return [_integers(inner) for inner in re.findall(r"\{([\d, ]*)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
