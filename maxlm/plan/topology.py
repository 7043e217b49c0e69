"""Names of machines, as their vendors give them, and what a compiler calls them."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Literal, NamedTuple

from maxlm.config import MaxlmError


class _Tpu(NamedTuple):
    """A chip's cores, which names of v4, v5p and 7x count, the torus's dimensions, the
    largest slice, and what Google calls slices (Google Cloud TPU documentation, a page
    a generation; "TPU configurations"; "About TPUs in GKE")."""

    cores: int
    dimensions: int
    most_chips: int
    gke_accelerator: str
    cloud_prefix: str
    """Prefix of Cloud TPU's type."""


TPUS = {
    "v4": _Tpu(2, 3, 4096, "tpu-v4-podslice", "v4"),
    "v5p": _Tpu(2, 3, 8960, "tpu-v5p-slice", "v5p"),
    "v5e": _Tpu(1, 2, 256, "tpu-v5-lite-podslice", "v5litepod"),
    "v6e": _Tpu(1, 2, 256, "tpu-v6e-slice", "v6e"),
    "tpu7x": _Tpu(2, 3, 9216, "tpu7x", "tpu7x"),
}
_ALIASES = {"7x": "tpu7x", "v7x": "tpu7x"}
# Slices of these machines, smallest first; others of three dimensions are multiples of
# 4x4x4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


class _Gpu(NamedTuple):
    """CUDA's device properties, as openxla/xla lists them for its own tests
    (xla/backends/gpu/target_config/specs)."""

    cores: int
    fpus: int
    clock: float
    l2_bytes: int
    bandwidth: float
    memory: int
    shared_kib: int
    """Shared memory of a core, of which a block may have all but 1 KiB."""
    capability: int
    name: str


_GPUS = {
    "a100": _Gpu(
        108, 64, 1.41, 41_943_040, 2.03904e12, 85_100_068_864, 164, 8, "A100-SXM4-80GB"
    ),
    "h100": _Gpu(
        132, 128, 1.98, 52_428_800, 3.35232e12, 84_942_979_072, 228, 9, "H100 80GB HBM3"
    ),
    "h200": _Gpu(
        132, 128, 1.98, 52_428_800, 4.8e12, 151_397_597_184, 228, 9, "H200 141GB HBM3e"
    ),
    "b200": _Gpu(
        148, 128, 1.965, 132_644_864, 7.67232e12, 191_514_411_008, 228, 10, "B200"
    ),
}
# What XLA's GPU compiler asks of a card, by the names it gives them, where no card is
# there to be asked.
_GPU_TARGET = """\
gpu_device_info {{
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {gpu.bandwidth:.0f}
  device_memory_size: {gpu.memory}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {gpu.capability} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {gpu.name}"
"""
_GPUS_PER_HOST = 8
# Bounds on what a name may ask for. No machine has a million devices, and a search
# walks over the divisors of their number; each virtual CPU device has threads and
# memory of its own.
_MAX_DEVICES = 2**20
_MAX_CPU_DEVICES = 1024
_FIX = "use v5p-64, v5e-256, v6e-64, 2xv5p-512, v5p:4x4x8, h100x64, cpux8 or the like"


@dataclass(frozen=True)
class Topology:
    """A machine to plan or compile for."""

    platform: Literal["tpu", "gpu", "cpu"]
    kind: str
    """v4, v5p, v5e, v6e, tpu7x, a100, h100, h200, b200, cpu."""
    shape: tuple[int, ...]
    """Chips along each dimension of a slice's torus; for GPUs hosts and GPUs a host;
    for CPUs (virtual) devices of one host."""
    slices: int = 1

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of a slice: two a chip of a tpu7x."""
        return prod(self.shape) * (2 if self.kind == "tpu7x" else 1)

    @property
    def devices(self) -> int:
        return self.slices * self.devices_per_slice

    @property
    def compiler_name(self) -> str:
        """Name that ``jax.experimental.topologies`` takes."""
        start = f"{self.kind}:" if self.platform == "tpu" else f"{self.slices}x"
        return start + _join(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of a slice's torus is closed to a ring: of three, all
        are where all are multiples of 4; of two, those of 16."""
        if len(self.shape) == 3:
            return (all(n % 4 == 0 for n in self.shape),) * 3
        return tuple(n == 16 for n in self.shape)

    @property
    def chips_per_host(self) -> int:
        """Chips of a TPU's host: 4, or 8 in slices of 8 with a torus of two dimensions
        (Google Cloud: v5litepod-8, ct6e-standard-8t)."""
        return 8 if len(self.shape) == 2 and prod(self.shape) == 8 else 4

    @property
    def description(self) -> str:
        """Numbers of chips, cores and hosts, in words, as names count one or another of
        them."""
        chips = self.slices * prod(self.shape)
        if self.platform == "cpu":
            return f"{_count(chips, 'CPU device')} on one host"
        if self.platform == "gpu":
            hosts = _count(self.slices * self.shape[0], "host")
            return f"{chips} {self.kind.upper()} GPUs on {hosts}"
        many = f"{self.slices} slices of " if self.slices > 1 else ""
        cores = chips * TPUS[self.kind].cores
        counted = f", {cores} cores" if cores > chips else ""
        counted += f", {self.devices} devices" if self.devices > chips else ""
        own = self.chips_per_host
        return (
            f"{many}{_join(self.shape, '×')} {self.kind} chips: "
            f"{_count(chips, 'chip')}{counted}, "
            f"{_count(max(chips // own, 1), 'host')} of {min(chips, own)}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _join(shape: tuple[int, ...], by: str = "x") -> str:
    return by.join(map(str, shape))


def parse_topology(text: str) -> Topology:
    """Parses a machine's name: ``v5p-64`` (cores: 32 chips), ``v5e-256`` (chips),
    ``2xv5p-512`` (slices), ``h100x64`` (8 a host), ``cpux8``, or a shape in JAX's form,
    ``v5p:4x4x2``, ``h100:8x8``. Raises MaxlmError: no such machine, or more devices
    than any has."""
    topology = _parse_topology(text)
    most = _MAX_CPU_DEVICES if topology.platform == "cpu" else _MAX_DEVICES
    if topology.devices > most:
        message = f"'{text}' has {topology.devices:,} devices, more than {most:,}"
        raise MaxlmError(message, fix="name a smaller machine")
    return topology


def _parse_topology(text: str) -> Topology:
    found = re.fullmatch(
        r"(?:(\d+)x)?([a-z0-9]*[a-z][a-z0-9]*?)(?:(-|x)(\d+)|:(\d+(?:x\d+)*))",
        text.lower(),
    )
    if not found:
        raise MaxlmError(f"'{text}' is not the name of a machine", fix=_FIX)
    slices, count = int(found[1] or 1), int(found[4] or 0)
    kind = _ALIASES.get(found[2], found[2])
    shape = tuple(int(n) for n in found[5].split("x")) if found[5] else ()
    if slices < 1 or 0 in shape:
        raise MaxlmError(f"'{text}' has no devices", fix=_FIX)
    if kind in TPUS and found[3] != "x":
        return Topology("tpu", kind, _find_slice(text, kind, count, shape), slices)
    if kind in _GPUS and (found[3] == "x" or len(shape) == 2):
        a_host = min(count, _GPUS_PER_HOST)
        if not shape and (count < 1 or count % a_host):
            fix = "use 8, 16, 24, ... GPUs"
            raise MaxlmError(f"{text} is not a whole number of hosts", fix=fix)
        return Topology("gpu", kind, shape or (count // a_host, a_host), slices)
    if (
        kind == "cpu"
        and slices == 1
        and (len(shape) == 1 or (found[3] == "x" and count))
    ):
        return Topology("cpu", kind, shape or (count,))
    near = get_close_matches(kind, (*TPUS, *_GPUS, "cpu"), n=1)
    fix = f"did you mean {near[0]}? {_FIX}" if near and near[0] != kind else _FIX
    raise MaxlmError(f"no machine is called '{text}'", fix=fix)


def _find_slice(
    text: str, kind: str, count: int, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns a shape as given, or the vendor's for a count: sides as equal as they can
    be."""
    cores, dimensions, most, *_ = TPUS[kind]
    chips = prod(shape) if shape else count // cores
    listed = _FLAT if dimensions == 2 else _SMALL
    known = [tuple(sorted(sides)) for sides in listed]
    if dimensions == 3 and chips % 64 == 0 and chips <= most:
        sides = [4 * n for n in range(1, chips // 64 + 1) if chips // 64 % n == 0]
        cubes = ((a, b, chips // (a * b)) for a in sides for b in sides)
        known += [tuple(sorted(s)) for s in cubes if prod(s) == chips and s[2] % 4 == 0]
    if shape and tuple(sorted(shape)) in known:
        return shape
    equal = [sides for sides in known if prod(sides) == chips]
    if shape or not equal or count % cores:
        names = ", ".join(f"{kind}-{cores * prod(sides)}" for sides in listed)
        more = ", or multiples of 4, as in v5p:4x4x8" if dimensions == 3 else ""
        fix = f"use {names}{more} ({most} chips at most)"
        raise MaxlmError(f"no standard slice is {text}", fix=fix)
    sides = min(equal, key=lambda sides: (max(sides), sides))
    # A torus of three dimensions is named with its longest side first, one of two with
    # its last.
    return sides[::-1] if dimensions == 3 else sides


def format_gpu_target(kind: str) -> str:
    """Formats a GPU for XLA's compiler: a GpuTargetConfigProto as text."""
    gpu = _GPUS[kind]
    shared, block = gpu.shared_kib * 1024, (gpu.shared_kib - 1) * 1024
    return _GPU_TARGET.format(gpu=gpu, shared=shared, block=block)
