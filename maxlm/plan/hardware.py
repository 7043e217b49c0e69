"""Figures of accelerators, each with its source, of one device as JAX counts them;
peaks are dense. What a program reaches of them is in ``plan/timing.py``."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

import jax
import jax.numpy as jnp

GB = 1e9
"""Of bytes."""
GIB = 2.0**30
TERA = 1e12


@dataclass(frozen=True)
class Chip:
    """One kind of device."""

    name: str
    family: str
    """Key of its efficiency (``plan/timing.py``)."""
    device_kinds: tuple[str, ...]
    """JAX's names for such a device."""
    peak_flops: Mapping[str, float]
    """FLOP/s (int8: OP/s) of matrix products, by dtype."""
    memory_bytes: float
    """Bytes that a program may use."""
    memory_bandwidth: float
    """B/s between main memory and the chip."""
    link_bandwidth: float
    """B/s one way: of each link of a TPU's torus; of a GPU's NVLinks together."""
    network_bandwidth: float
    """B/s one way for each device between slices, or between GPU hosts."""
    vector_flops: float
    """fp32 operations a second outside of matrix units."""
    latency_seconds: float
    """Seconds that a collective takes with nothing in it: a hop on a torus, a whole one
    on GPUs."""
    sources: str
    nvlink_domain_size: int = 0
    """GPUs that NVLink joins; 0: a TPU's torus does, or nothing."""
    page_allocation_bandwidth: float = inf
    """B/s at which a step gets the memory that it gives back; a pool's costs
    nothing."""
    read_bandwidth: float | None = None
    """B/s in reading alone; None: as in reading and writing."""


_TPU_HOP_SECONDS = 1e-6
_NCCL_SECONDS = 2e-5
_HOPPER_FLOPS = {"bf16": 989.4 * TERA, "tf32": 494.7 * TERA, "fp8": 1978.9 * TERA}
# The share of a GPU's memory that training asks JAX for (cli/train.py); JAX's own
# default is 0.75.
GPU_MEMORY_SHARE = 0.92
_BOOK = "links and network: jax-ml.github.io/scaling-book/tpus"
_XLA = "memory: openxla/xla xla/backends/gpu/target_config/specs"

# Memory of TPUs: the limit that libtpu's compiler names when a program does not fit,
# which is what the vendor's figure leaves after its own share. Of GPUs: a share of what
# CUDA reports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            family="tpu",
            device_kinds=("TPU v4",),
            peak_flops={"bf16": 275 * TERA, "int8": 275 * TERA},
            memory_bytes=30.75 * GIB,
            memory_bandwidth=1200 * GB,
            link_bandwidth=45 * GB,
            network_bandwidth=6.25 * GB,
            vector_flops=8.6 * TERA,
            latency_seconds=_TPU_HOP_SECONDS,
            sources=f"docs.cloud.google.com/tpu/docs/v4; {_BOOK}",
        ),
        Chip(
            name="v5e",
            family="tpu",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            peak_flops={"bf16": 197 * TERA, "int8": 393 * TERA},
            memory_bytes=15.75 * GIB,
            memory_bandwidth=819 * GB,
            link_bandwidth=45 * GB,
            network_bandwidth=3.125 * GB,
            vector_flops=6.1 * TERA,
            latency_seconds=_TPU_HOP_SECONDS,
            sources=f"docs.cloud.google.com/tpu/docs/v5e; {_BOOK}",
        ),
        Chip(
            name="v5p",
            family="tpu",
            device_kinds=("TPU v5", "TPU v5p"),
            peak_flops={"bf16": 459 * TERA, "int8": 918 * TERA},
            memory_bytes=95.74 * GIB,
            memory_bandwidth=2765 * GB,
            link_bandwidth=90 * GB,
            network_bandwidth=6.25 * GB,
            vector_flops=14.3 * TERA,
            latency_seconds=_TPU_HOP_SECONDS,
            sources=f"docs.cloud.google.com/tpu/docs/v5p; int8, {_BOOK}",
        ),
        Chip(
            name="v6e",
            family="tpu",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            peak_flops={"bf16": 918 * TERA, "int8": 1836 * TERA},
            memory_bytes=31.25 * GIB,
            memory_bandwidth=1638 * GB,
            link_bandwidth=90 * GB,
            network_bandwidth=12.5 * GB,
            vector_flops=7.2 * TERA,
            latency_seconds=_TPU_HOP_SECONDS,
            sources=f"docs.cloud.google.com/tpu/docs/v6e; {_BOOK}",
        ),
        # A chip is two devices, one a chiplet, which share its links and network.
        Chip(
            name="tpu7x",
            family="tpu",
            device_kinds=("TPU7x", "TPU v7x"),
            peak_flops={"bf16": 1153.5 * TERA, "fp8": 2307 * TERA},
            memory_bytes=94.75 * GIB,
            memory_bandwidth=3690 * GB,
            link_bandwidth=50 * GB,
            network_bandwidth=6.25 * GB,
            vector_flops=7.2 * TERA,
            latency_seconds=_TPU_HOP_SECONDS,
            sources="docs.cloud.google.com/tpu/docs/tpu7x, halves of a chip",
        ),
        Chip(
            name="a100",
            family="nvidia",
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            peak_flops={"bf16": 312 * TERA, "tf32": 156 * TERA},
            memory_bytes=GPU_MEMORY_SHARE * 85_100_068_864.0,
            memory_bandwidth=2039 * GB,
            link_bandwidth=300 * GB,
            network_bandwidth=25 * GB,
            vector_flops=9.7 * TERA,
            latency_seconds=_NCCL_SECONDS,
            sources=f"NVIDIA A100 datasheet, SXM 80 GB; network: DGX A100 datasheet; {_XLA}",
            nvlink_domain_size=8,
        ),
        Chip(
            name="l40s",
            family="nvidia",
            device_kinds=("NVIDIA L40S",),
            peak_flops={"bf16": 362 * TERA, "fp8": 733 * TERA, "tf32": 183 * TERA},
            memory_bytes=GPU_MEMORY_SHARE * 48_305_799_168.0,
            memory_bandwidth=864 * GB,
            link_bandwidth=32 * GB,
            network_bandwidth=25 * GB,
            vector_flops=45.8 * TERA,
            latency_seconds=_NCCL_SECONDS,
            sources=(
                "NVIDIA L40S datasheet, dense rates; links: PCIe 4.0 x16; memory: of its "
                "48 GB, what a driver reports with error correction"
            ),
            nvlink_domain_size=8,
        ),
        Chip(
            name="h100",
            family="nvidia",
            device_kinds=("NVIDIA H100 80GB HBM3",),
            peak_flops=_HOPPER_FLOPS,
            memory_bytes=GPU_MEMORY_SHARE * 84_942_979_072.0,
            memory_bandwidth=3350 * GB,
            link_bandwidth=450 * GB,
            network_bandwidth=50 * GB,
            vector_flops=33.5 * TERA,
            latency_seconds=_NCCL_SECONDS,
            sources=(
                f"NVIDIA H100 architecture white paper, SXM5; network: DGX H100 datasheet; "
                f"{_XLA}"
            ),
            nvlink_domain_size=8,
        ),
        Chip(
            name="h200",
            family="nvidia",
            device_kinds=("NVIDIA H200",),
            peak_flops=_HOPPER_FLOPS,
            memory_bytes=GPU_MEMORY_SHARE * 150 * GB,
            memory_bandwidth=4800 * GB,
            link_bandwidth=450 * GB,
            network_bandwidth=50 * GB,
            vector_flops=33.5 * TERA,
            latency_seconds=_NCCL_SECONDS,
            sources="NVIDIA H200 datasheet, SXM; memory: of its 141 GB, what a driver reports",
            nvlink_domain_size=8,
        ),
        Chip(
            name="b200",
            family="nvidia",
            device_kinds=("NVIDIA B200",),
            peak_flops={"bf16": 2250 * TERA, "fp8": 4500 * TERA, "tf32": 1100 * TERA},
            memory_bytes=GPU_MEMORY_SHARE * 191_514_411_008.0,
            memory_bandwidth=7672 * GB,
            link_bandwidth=900 * GB,
            network_bandwidth=50 * GB,
            vector_flops=37.2 * TERA,
            latency_seconds=_NCCL_SECONDS,
            sources=f"NVIDIA Blackwell architecture brief, HGX B200; bandwidth, {_XLA}",
            nvlink_domain_size=8,
        ),
    )
}


def find_chip(device: Any) -> Chip | None:
    """Returns a JAX device's chip; None: not in the table. A CPU is measured."""
    if device.platform == "cpu":
        return measure_cpu(len(device.client.local_devices()))
    for chip in CHIPS.values():
        if device.device_kind in chip.device_kinds:
            return chip
    return None


# Longer than another program's busy moment (0.3 s were seen), which would halve one
# figure and leave the rest.
_MEASURED_SECONDS = 1.5


@cache
def measure_cpu(devices: int) -> Chip:
    """Measures this machine's CPU, shared by a number of virtual devices: what large
    fp32 matrix products, SiLU and a sum reach now, how fast new memory is, and how much
    there is. Takes 2 s."""
    device = jax.local_devices(backend="cpu")[0]

    def make_ones(*shape: int) -> jax.Array:
        return jax.device_put(jnp.ones(shape, jnp.float32), device)

    square = make_ones(1024, 1024)
    large = make_ones(4096, 4096)
    mapped = make_ones(4096, 4096)
    more_than_caches = make_ones(2**26)
    matmul = jax.jit(jnp.matmul)
    add = jax.jit(jnp.add)
    total = jax.jit(jnp.sum)
    silu = jax.jit(jax.nn.silu, donate_argnums=0)

    def multiply() -> jax.Array:
        return matmul(square, square)

    # An element-wise map as programs have them, which here computes rather than waits
    # for memory. In place: fresh pages cost several times more, and are counted apart.
    def apply_silu() -> jax.Array:
        nonlocal mapped
        mapped = silu(mapped)
        return mapped

    def fill_new_pages() -> jax.Array:
        # The C library hands the sum's memory back to the system at once.
        return add(large, large)

    def read() -> jax.Array:
        return total(more_than_caches)

    runs = (multiply, apply_silu, fill_new_pages, read)
    for run in runs:  # compile
        run().block_until_ready()
    # In turns, so that a busy moment of the machine slows all of them.
    quickest = [inf] * len(runs)
    end = time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < end:
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run().block_until_ready()
            quickest[i] = min(quickest[i], time.perf_counter() - began)
    multiply_seconds, silu_seconds, page_seconds, read_seconds = quickest
    flops = 2 * 1024**3
    peak_flops = flops / multiply_seconds / devices
    silu_bytes = 2 * mapped.nbytes  # read and written
    bandwidth = silu_bytes / silu_seconds / devices
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Chip(
        name="cpu",
        family="cpu",
        device_kinds=("cpu",),
        peak_flops={"fp32": peak_flops, "bf16": peak_flops},
        memory_bytes=memory / devices,
        memory_bandwidth=bandwidth,
        # Virtual devices exchange by copies: read and written.
        link_bandwidth=bandwidth / 2,
        network_bandwidth=bandwidth / 2,
        # One operation an element, of which 4 bytes are read and 4 written.
        vector_flops=bandwidth / 8,
        latency_seconds=3e-4,
        sources="measured on this machine",
        page_allocation_bandwidth=large.nbytes / page_seconds / devices,
        read_bandwidth=more_than_caches.nbytes / read_seconds / devices,
    )
