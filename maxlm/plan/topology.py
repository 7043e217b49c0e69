"""Names of machines, as their vendors give them, and what a compiler calls them."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Literal, NamedTuple

from maxlm.config import MaxlmError


class _Tpu(NamedTuple):
    """A kind of TPU (Google Cloud TPU documentation, a page a generation; "TPU
    configurations"; "About TPUs in GKE")."""

    cores: int
    """Cores of a chip; names of v4, v5p and 7x count these."""
    dimensions: int
    """Of a slice's torus."""
    most_chips: int
    """Chips of the largest slice."""
    gke_accelerator: str
    """Value of GKE's node label ``cloud.google.com/gke-tpu-accelerator``."""
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
# Slices of two dimensions, and small ones of three, smallest first; larger ones of
# three have sides that are multiples of 4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


class _Gpu(NamedTuple):
    """CUDA's device properties, as openxla/xla lists them for its own tests
    (xla/backends/gpu/target_config/specs)."""

    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    bandwidth: float
    """B/s of main memory."""
    memory_bytes: int
    shared_kib: int
    """KiB of shared memory of a core, of which a block may have all but 1 KiB."""
    compute_capability: tuple[int, int]
    """Its major and minor number."""
    name: str


_GPUS = {
    "a100": _Gpu(
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        l2_bytes=41_943_040,
        bandwidth=2.03904e12,
        memory_bytes=85_100_068_864,
        shared_kib=164,
        compute_capability=(8, 0),
        name="A100-SXM4-80GB",
    ),
    "l40s": _Gpu(
        cores=142,
        fpus_per_core=128,
        clock_ghz=2.52,
        l2_bytes=100_663_296,
        bandwidth=8.64e11,
        memory_bytes=48_305_799_168,
        shared_kib=100,
        compute_capability=(8, 9),
        name="L40S",
    ),
    "h100": _Gpu(
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        l2_bytes=52_428_800,
        bandwidth=3.35232e12,
        memory_bytes=84_942_979_072,
        shared_kib=228,
        compute_capability=(9, 0),
        name="H100 80GB HBM3",
    ),
    "h200": _Gpu(
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        l2_bytes=52_428_800,
        bandwidth=4.8e12,
        memory_bytes=151_397_597_184,
        shared_kib=228,
        compute_capability=(9, 0),
        name="H200 141GB HBM3e",
    ),
    "b200": _Gpu(
        cores=148,
        fpus_per_core=128,
        clock_ghz=1.965,
        l2_bytes=132_644_864,
        bandwidth=7.67232e12,
        memory_bytes=191_514_411_008,
        shared_kib=228,
        compute_capability=(10, 0),
        name="B200",
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
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {gpu.bandwidth:.0f}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_core: {core_shared_bytes}
  shared_memory_per_block_optin: {block_shared_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
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
    """v4, v5p, v5e, v6e, tpu7x, a100, l40s, h100, h200, b200, cpu."""
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
        prefix = f"{self.kind}:" if self.platform == "tpu" else f"{self.slices}x"
        return prefix + _join(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of a slice's torus is closed to a ring: of three, all
        are where all are multiples of 4; of two, those of 16."""
        if len(self.shape) == 3:
            is_closed = all(side % 4 == 0 for side in self.shape)
            return (is_closed, is_closed, is_closed)
        return tuple(side == 16 for side in self.shape)

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
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        counts = [_count(chips, "chip")]
        cores = chips * TPUS[self.kind].cores
        if cores > chips:
            counts.append(f"{cores} cores")
        if self.devices > chips:
            counts.append(f"{self.devices} devices")
        hosts = max(chips // self.chips_per_host, 1)
        counts.append(f"{_count(hosts, 'host')} of {min(chips, self.chips_per_host)}")
        shape = _join(self.shape, "×")
        return f"{slices}{shape} {self.kind} chips: {', '.join(counts)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


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


# Groups: slices, kind, then "-" or "x" with a count, or ":" with a shape.
_NAME = re.compile(
    r"(?:(?P<slices>\d+)x)?"
    r"(?P<kind>[a-z0-9]*[a-z][a-z0-9]*?)"
    r"(?:(?P<separator>-|x)(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)*))"
)


def _parse_topology(text: str) -> Topology:
    match = _NAME.fullmatch(text.lower())
    if match is None:
        raise MaxlmError(f"'{text}' is not the name of a machine", fix=_FIX)
    slices = int(match["slices"] or 1)
    count = int(match["count"] or 0)
    kind = _ALIASES.get(match["kind"], match["kind"])
    shape = tuple(int(side) for side in (match["shape"] or "").split("x") if side)
    by_count = match["separator"] == "x"
    if slices < 1 or 0 in shape:
        raise MaxlmError(f"'{text}' has no devices", fix=_FIX)
    if kind in TPUS and not by_count:
        return Topology("tpu", kind, _find_slice(text, kind, count, shape), slices)
    if kind in _GPUS and (by_count or len(shape) == 2):
        return Topology("gpu", kind, shape or _split_gpus(text, count), slices)
    if kind == "cpu" and slices == 1:
        if len(shape) == 1:
            return Topology("cpu", kind, shape)
        if by_count and count:
            return Topology("cpu", kind, (count,))
    near = get_close_matches(kind, (*TPUS, *_GPUS, "cpu"), n=1)
    fix = _FIX
    if near and near[0] != kind:
        fix = f"did you mean {near[0]}? {_FIX}"
    raise MaxlmError(f"no machine is called '{text}'", fix=fix)


def _split_gpus(text: str, count: int) -> tuple[int, int]:
    """Returns the hosts, and the GPUs of each, of so many GPUs."""
    gpus_per_host = min(count, _GPUS_PER_HOST)
    if count < 1 or count % gpus_per_host:
        message = f"{text} is not a whole number of hosts"
        raise MaxlmError(message, fix="use 8, 16, 24, ... GPUs")
    return count // gpus_per_host, gpus_per_host


def _find_slice(
    text: str, kind: str, count: int, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns a shape as it is named, or the vendor's for a count: sides as equal as
    they can be."""
    tpu = TPUS[kind]
    chips = prod(shape) if shape else count // tpu.cores
    listed = _FLAT if tpu.dimensions == 2 else _SMALL
    known = [tuple(sorted(sides)) for sides in listed]
    if tpu.dimensions == 3 and chips <= tpu.most_chips:
        known += _list_cubes(chips)
    if shape and tuple(sorted(shape)) in known:
        return shape
    with_count = [sides for sides in known if prod(sides) == chips]
    if shape or not with_count or count % tpu.cores:
        names = ", ".join(f"{kind}-{tpu.cores * prod(sides)}" for sides in listed)
        others = ", or multiples of 4, as in v5p:4x4x8" if tpu.dimensions == 3 else ""
        fix = f"use {names}{others} ({tpu.most_chips} chips at most)"
        raise MaxlmError(f"no standard slice is {text}", fix=fix)
    sides = min(with_count, key=lambda sides: (max(sides), sides))
    # A torus of three dimensions is named with its longest side first, one of two with
    # its last.
    return sides[::-1] if tpu.dimensions == 3 else sides


def _list_cubes(chips: int) -> list[tuple[int, ...]]:
    """Lists the sides, in ascending order, of boxes of 4x4x4 cubes with so many
    chips."""
    num_cubes, rest = divmod(chips, 64)
    if rest:
        return []
    divisors = [n for n in range(1, num_cubes + 1) if num_cubes % n == 0]
    boxes = []
    for first in divisors:
        for second in divisors:
            third, rest = divmod(num_cubes, first * second)
            if rest == 0:
                box = tuple(sorted((4 * first, 4 * second, 4 * third)))
                boxes.append(box)
    return boxes


def format_gpu_target(kind: str) -> str:
    """Formats a GPU for XLA's compiler: a GpuTargetConfigProto as text."""
    gpu = _GPUS[kind]
    major, minor = gpu.compute_capability
    return _GPU_TARGET.format(
        gpu=gpu,
        major=major,
        minor=minor,
        core_shared_bytes=gpu.shared_kib * 1024,
        block_shared_bytes=(gpu.shared_kib - 1) * 1024,
    )
