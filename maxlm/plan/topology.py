"""Names of machines, as their vendors give them, and what a compiler calls them."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, Literal

from maxlm.config import MaxlmError

# Counted units a chip, as the names count them (v4, v5p and 7x: cores), dimensions of the torus,
# and chips of the largest slice (Google Cloud TPU documentation, a page a generation).
_TPUS = {
    "v4": (2, 3, 4096),
    "v5p": (2, 3, 8960),
    "v5e": (1, 2, 256),
    "v6e": (1, 2, 256),
    "tpu7x": (2, 3, 9216),
}
_ALIASES = {"7x": "tpu7x", "v7x": "tpu7x"}
# Slices of these machines, smallest first; others of three dimensions are multiples of 4x4x4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# What XLA's GPU compiler asks of a card, by the names it gives them, where no card is there to be
# asked: CUDA's device properties, as openxla/xla lists them for its own tests
# (xla/backends/gpu/target_config/specs).
_COMMON = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_block_limit": 65_536,
    "registers_per_core_limit": 65_536,
    "shared_memory_per_block": 48 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
}


def _card(
    cores: int, fpus: int, clock: float, l2: int, bandwidth: float, memory: int, shared: int
) -> dict[str, Any]:
    """Properties that differ: ``shared`` is the shared memory of a core, of which a block may
    have all but 1 KiB."""
    return _COMMON | {
        "core_count": cores,
        "fpus_per_core": fpus,
        "clock_rate_ghz": clock,
        "l2_cache_size": l2,
        "memory_bandwidth": round(bandwidth),
        "device_memory_size": memory,
        "shared_memory_per_core": shared * 1024,
        "shared_memory_per_block_optin": (shared - 1) * 1024,
    }


# kind → (properties, compute capability, name)
_GPUS = {
    "a100": (
        _card(108, 64, 1.41, 41_943_040, 2.03904e12, 85_100_068_864, 164),
        (8, 0),
        "NVIDIA A100-SXM4-80GB",
    ),
    "h100": (
        _card(132, 128, 1.98, 52_428_800, 3.35232e12, 84_942_979_072, 228),
        (9, 0),
        "NVIDIA H100 80GB HBM3",
    ),
    "h200": (
        _card(132, 128, 1.98, 52_428_800, 4.8e12, 151_397_597_184, 228),
        (9, 0),
        "NVIDIA H200 141GB HBM3e",
    ),
    "b200": (
        _card(148, 128, 1.965, 132_644_864, 7.67232e12, 191_514_411_008, 228),
        (10, 0),
        "NVIDIA B200",
    ),
}
_GPUS_PER_HOST = 8
_KINDS = (*_TPUS, *_GPUS, "cpu")
_FIX = "use v5p-64, v5e-256, v6e-64, 2xv5p-512, v5p:4x4x8, h100x64, cpux8 or the like"


@dataclass(frozen=True)
class Topology:
    """A machine to plan or compile for."""

    platform: Literal["tpu", "gpu", "cpu"]
    kind: str
    """v4, v5p, v5e, v6e, tpu7x, a100, h100, h200, b200, cpu."""
    shape: tuple[int, ...]
    """Chips along each dimension of a slice's torus; for GPUs hosts and GPUs a host; for CPUs
    (virtual) devices of one host."""
    slices: int = 1

    @property
    def devices(self) -> int:
        """As JAX counts them: a 7x chip is two."""
        return self.slices * prod(self.shape) * (2 if self.kind == "tpu7x" else 1)

    @property
    def compiler_name(self) -> str:
        """As ``jax.experimental.topologies`` takes it."""
        shape = "x".join(map(str, self.shape))
        return f"{self.kind}:{shape}" if self.platform == "tpu" else f"{self.slices}x{shape}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of a slice's torus is closed to a ring: of three, all are where
        all are multiples of 4; of two, those of 16."""
        if len(self.shape) == 3:
            return (all(n % 4 == 0 for n in self.shape),) * 3
        return tuple(n == 16 for n in self.shape)

    @property
    def chips_per_host(self) -> int:
        """Chips of a TPU's host: 4, or 8 in slices of 8 with a torus of two dimensions
        (Google Cloud: v5litepod-8, ct6e-standard-8t)."""
        return 8 if len(self.shape) == 2 and prod(self.shape) == 8 else 4

    @property
    def words(self) -> str:
        """Chips, cores and hosts, so that nobody has to remember what a name counts."""
        chips = self.slices * prod(self.shape)
        shape = "×".join(map(str, self.shape))
        many = f"{self.slices} slices of " if self.slices > 1 else ""
        if self.platform == "cpu":
            return f"{chips} CPU device{'s' if chips > 1 else ''} on one host"
        if self.platform == "gpu":
            hosts = self.slices * self.shape[0]
            kind = self.kind.upper()
            return f"{chips} {kind} GPUs on {hosts} host{'s' if hosts > 1 else ''}"
        cores = chips * _TPUS[self.kind][0]
        counted = f", {cores} cores" if cores > chips else ""
        counted += f", {self.devices} devices" if self.devices > chips else ""
        own = self.chips_per_host
        hosts = max(chips // own, 1)
        return (
            f"{many}{shape} {self.kind} chips: {chips} chip{'s' if chips > 1 else ''}{counted}, "
            f"{hosts} host{'s' if hosts > 1 else ''} of {min(chips, own)}"
        )


def parse_topology(text: str) -> Topology:
    """Parses a machine's name: ``v5p-64`` (cores: 32 chips), ``v5e-256`` (chips), ``2xv5p-512``
    (slices), ``h100x64`` (8 a host), ``cpux8``, or a shape in JAX's form, ``v5p:4x4x2``,
    ``h100:8x8``.

    Raises:
        MaxlmError: unknown, or a size that no machine has.
    """
    found = re.fullmatch(
        r"(?:(\d+)x)?([a-z0-9]*[a-z][a-z0-9]*?)(?:(-|x)(\d+)|:(\d+(?:x\d+)*))", text
    )
    if not found and (plain := text.lower()) != text:
        parse_topology(plain)  # Else says what is wrong with that.
        raise MaxlmError(f"no machine is called '{text}'", fix=f"did you mean {plain}?")
    if not found:
        raise MaxlmError(f"'{text}' is not the name of a machine", fix=_FIX)
    slices, count = int(found[1] or 1), int(found[4] or 0)
    kind = _ALIASES.get(found[2], found[2])
    shape = tuple(int(n) for n in found[5].split("x")) if found[5] else ()
    if slices < 1 or 0 in shape:
        raise MaxlmError(f"'{text}' has no devices", fix=_FIX)
    if kind == "cpu" and (found[3] == "x" or len(shape) == 1) and (count or shape):
        return Topology("cpu", kind, shape or (count,), 1) if slices == 1 else _unknown(text, kind)
    if kind in _GPUS and (found[3] == "x" or len(shape) == 2):
        return Topology("gpu", kind, shape or _hosts(text, count), slices)
    if kind not in _TPUS or found[3] == "x":
        return _unknown(text, kind)
    if shape:
        _check_shape(text, kind, shape)
        return Topology("tpu", kind, shape, slices)
    return Topology("tpu", kind, _torus(text, count, *_TPUS[kind]), slices)


def _unknown(text: str, kind: str) -> Topology:
    near = get_close_matches(kind, _KINDS, n=1)
    raise MaxlmError(
        f"no machine is called '{text}'",
        fix=f"did you mean {near[0]}? {_FIX}" if near and near[0] != kind else _FIX,
    )


def _check_shape(text: str, kind: str, shape: tuple[int, ...]) -> None:
    """Slices that are given out: a list where a torus is flat, else its smallest ones and
    multiples of 4x4x4, up to a pod."""
    _, dimensions, most = _TPUS[kind]
    if dimensions == 2:
        known = tuple(sorted(shape)) in _FLAT
        allowed = ", ".join("x".join(map(str, s)) for s in _FLAT)
    else:
        known = tuple(sorted(shape)) in (tuple(sorted(s)) for s in _SMALL)
        known |= len(shape) == 3 and all(n % 4 == 0 for n in shape) and prod(shape) <= most
        small = ", ".join("x".join(map(str, s)) for s in _SMALL)
        allowed = f"{small}, or three multiples of 4 with {most} chips at most"
    if not known:
        raise MaxlmError(f"no {kind} slice is {'x'.join(map(str, shape))}", fix=f"use {allowed}")


def count_torus_dimensions(kind: str) -> int:
    """Returns the number of dimensions of a TPU's torus."""
    return _TPUS[kind][1]


def format_gpu_target(kind: str) -> str:
    """Formats a GPU for XLA's compiler: a GpuTargetConfigProto as text."""
    properties, (major, minor), name = _GPUS[kind]
    lines = [f"  {key}: {value}" for key, value in properties.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{name}"',
        ]
    )


def _hosts(text: str, count: int) -> tuple[int, int]:
    if count < 1 or (count > _GPUS_PER_HOST and count % _GPUS_PER_HOST):
        raise MaxlmError(f"{text} is not a whole number of hosts", fix="use 8, 16, 24, ... GPUs")
    per_host = min(count, _GPUS_PER_HOST)
    return count // per_host, per_host


def _torus(text: str, count: int, cores: int, dimensions: int, most: int) -> tuple[int, ...]:
    """The slice that the vendor gives out for a count: sides as equal as they can be."""
    chips = count // cores
    shapes = _FLAT if dimensions == 2 else (*_SMALL, *_cubes(min(chips, most)))
    found = [shape for shape in shapes if prod(shape) == chips]
    if count % cores or not found or chips > most:
        least = f"{cores}, {4 * cores}, {8 * cores}, ... up to {most * cores}"
        raise MaxlmError(
            f"no standard slice is {text}", fix=f"use {least}, or name the shape, as in v5p:4x4x8"
        )
    sides = min(found, key=lambda shape: (max(shape), sorted(shape)))
    # A torus of three dimensions is named with its longest side first, one of two with its last.
    return tuple(sorted(sides, reverse=dimensions == 3))


def _cubes(chips: int) -> list[tuple[int, ...]]:
    """Shapes of so many chips whose sides are multiples of 4."""
    cubes = chips // 64 if chips % 64 == 0 else 0
    sides = [n for n in range(1, cubes + 1) if cubes % n == 0]
    return [
        (4 * a, 4 * b, 4 * (cubes // (a * b))) for a in sides for b in sides if cubes % (a * b) == 0
    ]
