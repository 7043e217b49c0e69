"""Names of machines, as their vendors give them, and what a compiler calls them."""

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

from maxlm.config import MaxlmError

# TensorCores a chip and dimensions of the torus; v4 and v5p are named after their cores.
_TPUS = {"v4": (2, 3), "v5p": (2, 3), "v5e": (1, 2), "v6e": (1, 2)}
# What XLA's GPU compiler asks of a card, by the names it gives them, where no card is there to be
# asked. CUDA's device properties of an H100 SXM5 80 GB; NVIDIA H100 architecture white paper.
_H100 = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_block_limit": 65_536,
    "registers_per_core_limit": 65_536,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 1024**2,
    "memory_bandwidth": 3_352_320_000_000,
    "device_memory_size": 84_942_979_072,
}
# (properties, compute capability, name)
_GPUS = {"h100": (_H100, (9, 0), "NVIDIA H100 80GB HBM3")}
_GPUS_PER_HOST = 8
_FIX = "use v5p-64, v5e-256, v6e-64, 2xv5p-512, v5p:4x4x2, h100x64 or the like"


@dataclass(frozen=True)
class Topology:
    """A machine to compile for."""

    platform: Literal["tpu", "gpu"]
    kind: str
    """v4, v5p, v5e, v6e, h100, ..."""
    shape: tuple[int, ...]
    """Chips along each dimension of a slice's torus; for GPUs hosts and GPUs a host."""
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.slices * prod(self.shape)

    @property
    def compiler_name(self) -> str:
        """As ``jax.experimental.topologies`` takes it."""
        shape = "x".join(map(str, self.shape))
        return f"{self.kind}:{shape}" if self.platform == "tpu" else f"{self.slices}x{shape}"


def parse_topology(text: str) -> Topology:
    """A machine's name: ``v5p-64`` (cores: 32 chips), ``v5e-256`` (chips), ``2xv5p-512`` (slices),
    ``h100x64`` (8 a host), or a shape in JAX's form, ``v5p:4x4x2``, ``h100:8x8``.

    Raises:
        MaxlmError: unknown, or a size that no machine has.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*?)(?:(-|x)(\d+)|:(\d+(?:x\d+)*))", text)
    if not found:
        raise MaxlmError(f"'{text}' is not the name of a machine", fix=_FIX)
    slices, kind, count = int(found[1] or 1), found[2], int(found[4] or 0)
    shape = tuple(int(n) for n in found[5].split("x")) if found[5] else ()
    if kind in _GPUS:
        return Topology("gpu", kind, shape or _hosts(text, count), slices)
    if shape:
        return Topology("tpu", kind, shape, slices)
    if kind not in _TPUS or found[3] == "x":
        raise MaxlmError(f"no machine is called '{text}'", fix=_FIX)
    cores, dimensions = _TPUS[kind]
    return Topology("tpu", kind, _torus(text, count, cores, dimensions), slices)


def gpu_target(kind: str) -> str:
    """A GPU described to XLA's compiler: a GpuTargetConfigProto as text."""
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


def _torus(text: str, count: int, cores: int, dimensions: int) -> tuple[int, ...]:
    """The slice that the vendor gives out for a count: sides as equal as powers of two allow."""
    chips = count // cores
    if count % cores or chips < 1 or chips & (chips - 1):
        least = f"{cores}, {2 * cores}, {4 * cores}, ..."
        raise MaxlmError(
            f"no standard slice is {text}", fix=f"use {least}, or name the shape, as in v5p:4x4x6"
        )
    doublings = chips.bit_length() - 1
    sides = [
        2 ** (doublings // dimensions + (d < doublings % dimensions)) for d in range(dimensions)
    ]
    # A torus of three dimensions is named with its longest side first, one of two with its last.
    return tuple(sorted(sides, reverse=dimensions == 3))
