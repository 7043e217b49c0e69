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


_TPU, _NVIDIA = 1e-6, 2e-5
_A100 = {"bf16": 312 * TERA, "tf32": 156 * TERA}
_B200 = {"bf16": 2250 * TERA, "fp8": 4500 * TERA, "tf32": 1100 * TERA}
_H100 = {"bf16": 989.4 * TERA, "tf32": 494.7 * TERA}
# The share of a GPU's memory that training asks JAX for (cli/train.py); JAX's own
# default is 0.75.
GPU_SHARE = 0.92
_BOOK = "links and network: jax-ml.github.io/scaling-book/tpus"
_XLA = "memory: openxla/xla xla/backends/gpu/target_config/specs"

# Memory of TPUs: the limit that libtpu's compiler names when a program does not fit,
# which is what the vendor's figure leaves after its own share. Of GPUs: a share of what
# CUDA reports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "tpu", ("TPU v4",), {"bf16": 275 * TERA, "int8": 275 * TERA}),
            *(30.75 * GIB, 1200 * GB, 45 * GB, 6.25 * GB, 8.6 * TERA, _TPU),
            f"docs.cloud.google.com/tpu/docs/v4; {_BOOK}",
        ),
        Chip(
            *(
                "v5e",
                "tpu",
                ("TPU v5 lite", "TPU v5e"),
                {"bf16": 197 * TERA, "int8": 393 * TERA},
            ),
            *(15.75 * GIB, 819 * GB, 45 * GB, 3.125 * GB, 6.1 * TERA, _TPU),
            f"docs.cloud.google.com/tpu/docs/v5e; {_BOOK}",
        ),
        Chip(
            *(
                "v5p",
                "tpu",
                ("TPU v5", "TPU v5p"),
                {"bf16": 459 * TERA, "int8": 918 * TERA},
            ),
            *(95.74 * GIB, 2765 * GB, 90 * GB, 6.25 * GB, 14.3 * TERA, _TPU),
            f"docs.cloud.google.com/tpu/docs/v5p; int8, {_BOOK}",
        ),
        Chip(
            *(
                "v6e",
                "tpu",
                ("TPU v6 lite", "TPU v6e"),
                {"bf16": 918 * TERA, "int8": 1836 * TERA},
            ),
            *(31.25 * GIB, 1638 * GB, 90 * GB, 12.5 * GB, 7.2 * TERA, _TPU),
            f"docs.cloud.google.com/tpu/docs/v6e; {_BOOK}",
        ),
        # A chip is two devices, one a chiplet, which share its links and network.
        Chip(
            *(
                "tpu7x",
                "tpu",
                ("TPU7x", "TPU v7x"),
                {"bf16": 1153.5 * TERA, "fp8": 2307 * TERA},
            ),
            *(94.75 * GIB, 3690 * GB, 50 * GB, 6.25 * GB, 7.2 * TERA, _TPU),
            "docs.cloud.google.com/tpu/docs/tpu7x, halves of a chip",
        ),
        Chip(
            *("a100", "nvidia", ("NVIDIA A100-SXM4-80GB",), _A100),
            *(
                GPU_SHARE * 85_100_068_864.0,
                2039 * GB,
                300 * GB,
                25 * GB,
                9.7 * TERA,
                _NVIDIA,
            ),
            f"NVIDIA A100 datasheet, SXM 80 GB; network: DGX A100 datasheet; {_XLA}",
            nvlink_domain_size=8,
        ),
        Chip(
            *(
                "h100",
                "nvidia",
                ("NVIDIA H100 80GB HBM3",),
                {**_H100, "fp8": 1978.9 * TERA},
            ),
            *(
                GPU_SHARE * 84_942_979_072.0,
                3350 * GB,
                450 * GB,
                50 * GB,
                33.5 * TERA,
                _NVIDIA,
            ),
            f"NVIDIA H100 architecture white paper, SXM5; network: DGX H100 datasheet; "
            f"{_XLA}",
            nvlink_domain_size=8,
        ),
        Chip(
            *("h200", "nvidia", ("NVIDIA H200",), {**_H100, "fp8": 1978.9 * TERA}),
            *(GPU_SHARE * 150 * GB, 4800 * GB, 450 * GB, 50 * GB, 33.5 * TERA, _NVIDIA),
            "NVIDIA H200 datasheet, SXM; memory: of its 141 GB, what a driver reports",
            nvlink_domain_size=8,
        ),
        Chip(
            *("b200", "nvidia", ("NVIDIA B200",), _B200),
            *(
                GPU_SHARE * 191_514_411_008.0,
                7672 * GB,
                900 * GB,
                50 * GB,
                37.2 * TERA,
                _NVIDIA,
            ),
            f"NVIDIA Blackwell architecture brief, HGX B200; bandwidth, {_XLA}",
            nvlink_domain_size=8,
        ),
    )
}


def find_chip(device: Any) -> Chip | None:
    """Returns a JAX device's chip; None: not in the table. A CPU is measured."""
    if device.platform == "cpu":
        return measure_cpu(len(device.client.local_devices()))
    return next(
        (c for c in CHIPS.values() if device.device_kind in c.device_kinds), None
    )


@cache
def measure_cpu(devices: int) -> Chip:
    """Measures this machine's CPU, shared by a number of virtual devices: what large
    fp32 matrix products, SiLU and a sum reach now, how fast new memory is, and how much
    there is. Takes 2 s."""
    device = jax.local_devices(backend="cpu")[0]
    shapes = (
        (1024, 1024),
        (4096, 4096),
        (4096, 4096),
        (2**26,),
    )  # the last is more than caches hold
    square, large, mapped, read = (
        jax.device_put(jnp.ones(s, jnp.float32), device) for s in shapes
    )
    matmul, add, total = jax.jit(jnp.matmul), jax.jit(jnp.add), jax.jit(jnp.sum)
    silu = jax.jit(jax.nn.silu, donate_argnums=0)

    # An element-wise map as programs have them, which here computes rather than waits
    # for memory. In place: fresh pages cost several times more, and are counted apart.
    def apply_silu() -> jax.Array:
        nonlocal mapped
        mapped = silu(mapped)
        return mapped

    runs = (
        lambda: matmul(square, square),
        apply_silu,
        lambda: add(
            large, large
        ),  # which the C library hands back to the system at once
        lambda: total(read),
    )
    for run in runs:  # compile
        run().block_until_ready()
    # In turns, and for longer than another program's busy moment (0.3 s were seen),
    # which would halve one figure and leave the rest.
    quickest, end = [inf] * len(runs), time.perf_counter() + 1.5
    while time.perf_counter() < end:
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run().block_until_ready()
            quickest[i] = min(quickest[i], time.perf_counter() - began)
    work = (2 * 1024**3, 2 * large.nbytes, large.nbytes, read.nbytes)
    peak, bandwidth, pages, reading = (
        w / q / devices for w, q in zip(work, quickest, strict=True)
    )
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Chip(
        *("cpu", "cpu", ("cpu",), {"fp32": peak, "bf16": peak}, memory / devices),
        *(bandwidth, bandwidth / 2, bandwidth / 2, bandwidth / 8, 3e-4),
        "measured on this machine",
        page_allocation_bandwidth=pages,
        read_bandwidth=reading,
    )
