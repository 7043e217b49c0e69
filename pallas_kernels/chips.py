"""TPUs and their cores: what decides a kernel's blocks, and what its cycles are worth."""

from typing import Any, NamedTuple

import jax

_MIB = 1 << 20
_MXU_128, _MXU_256 = 2 * 128**2, 2 * 2 * 256**2


class Chip(NamedTuple):
    """One JAX device of a TPU: a chip, or one of the two cores of a 7x (Google Cloud's pages, a
    page a generation; JAX's ``TpuInfo``)."""

    name: str
    topology: str
    """The smallest that ``jax.experimental.topologies`` knows."""
    vmem: int
    """Bytes, of a core."""
    cores: int
    """TensorCores that share a device, and a kernel's grid (megacore)."""
    mxu: int
    """Rows and columns of a matrix unit."""
    mxus: int
    """Matrix units of a core."""
    flops_per_mxu_cycle: int
    """bf16. A 256-wide unit takes two rows a cycle."""
    peak_flops: float
    """Of the device, bf16, as the vendor states it, FLOP/s."""

    @property
    def clock(self) -> float:
        """Hz: the one at which every matrix unit, always busy, gives the stated peak."""
        return self.peak_flops / (self.cores * self.mxus * self.flops_per_mxu_cycle)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:2x2x1", 16 * _MIB, 2, 128, 4, _MXU_128, 2.75e14),
        Chip("v5e", "v5e:2x2", 128 * _MIB, 1, 128, 4, _MXU_128, 1.97e14),
        Chip("v5p", "v5p:2x2x1", 64 * _MIB, 2, 128, 4, _MXU_128, 4.59e14),
        Chip("v6e", "v6e:2x2", 128 * _MIB, 1, 256, 2, _MXU_256, 9.18e14),
        Chip("7x", "tpu7x:2x2x1", 64 * _MIB, 1, 256, 2, _MXU_256, 2.307e15 / 2),
    )
}
# By ``Device.device_kind``.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}
# Its blocks fit all.
_SMALLEST = "v4"


def current_platform() -> str:
    """Of the devices that the program being traced is for ("cpu", "gpu", "tpu"): those of the mesh
    in use, which need not be here; else the default device's."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    config: Any = jax.config
    device = device or config.jax_default_device
    if device is None:
        return jax.default_backend()
    name = device if isinstance(device, str) else device.platform
    return "gpu" if name == "cuda" else name


def current_chip() -> Chip:
    """The TPU that the program being traced is for: of the mesh in use, else this machine's; where
    that is no TPU, the one with the least VMEM."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return CHIPS[_SMALLEST if device is None else _KINDS.get(device.device_kind, _SMALLEST)]
