"""The backend of a program, and TPUs: what decides a kernel's blocks, and what its
cycles cost."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_MIB = 1 << 20
# bf16 FLOPs of a matrix unit in a cycle: a multiplication and an addition in each cell,
# for one row of its size or, 256 wide, for two.
_MXU_128 = 2 * 128**2
_MXU_256 = 2 * 2 * 256**2
# 8-bit floats that chips multiply.
_E5M2 = (jnp.float8_e5m2,)
_BOTH = (jnp.float8_e4m3fn, jnp.float8_e5m2)


class TpuChip(NamedTuple):
    """One JAX device of a TPU: a chip, or one of the two cores of a 7x (Google Cloud's
    pages, a page a generation; JAX's ``TpuInfo``)."""

    name: str
    topology: str
    """The smallest topology that ``jax.experimental.topologies`` knows."""
    vmem_bytes: int
    """Bytes of VMEM of a core."""
    num_cores: int
    """TensorCores that share a device, and a kernel's grid (megacore)."""
    mxu_size: int
    """Rows and columns of a matrix unit."""
    mxus_per_core: int
    """Matrix units of a core."""
    flops_per_mxu_cycle: int
    """bf16 FLOPs of a matrix unit in a cycle. A 256-wide unit takes two rows a
    cycle."""
    peak_flops: float
    """FLOP/s of the device, bf16, as the vendor states it."""
    int8: bool = True
    """Whether it multiplies int8."""
    float8: tuple[DTypeLike, ...] = ()
    """8-bit floats that it multiplies; others are widened to bf16, which holds them
    exactly."""

    def multiplies_natively(self, left: DTypeLike, right: DTypeLike) -> bool:
        """Whether operands of these types are multiplied as they are."""
        are_8_bit = jnp.dtype(left).itemsize == jnp.dtype(right).itemsize == 1
        if not are_8_bit:
            return left == right
        if jnp.int8 in (left, right):
            return left == right and self.int8
        return left in self.float8 and right in self.float8

    @property
    def clock_hz(self) -> float:
        """Clock rate at which every matrix unit, always busy, gives the stated peak;
        Hz."""
        num_mxus = self.num_cores * self.mxus_per_core
        return self.peak_flops / (num_mxus * self.flops_per_mxu_cycle)


_V4 = TpuChip(
    name="v4",
    topology="v4:2x2x1",
    vmem_bytes=16 * _MIB,
    num_cores=2,
    mxu_size=128,
    mxus_per_core=4,
    flops_per_mxu_cycle=_MXU_128,
    peak_flops=2.75e14,
    int8=False,
)
_V5E = TpuChip(
    name="v5e",
    topology="v5e:2x2",
    vmem_bytes=128 * _MIB,
    num_cores=1,
    mxu_size=128,
    mxus_per_core=4,
    flops_per_mxu_cycle=_MXU_128,
    peak_flops=1.97e14,
    float8=_E5M2,
)
_V5P = TpuChip(
    name="v5p",
    topology="v5p:2x2x1",
    vmem_bytes=64 * _MIB,
    num_cores=2,
    mxu_size=128,
    mxus_per_core=4,
    flops_per_mxu_cycle=_MXU_128,
    peak_flops=4.59e14,
    float8=_E5M2,
)
_V6E = TpuChip(
    name="v6e",
    topology="v6e:2x2",
    vmem_bytes=128 * _MIB,
    num_cores=1,
    mxu_size=256,
    mxus_per_core=2,
    flops_per_mxu_cycle=_MXU_256,
    peak_flops=9.18e14,
    float8=_E5M2,
)
# A device is one of the chip's two cores, and has half of what is stated for a chip.
_7X = TpuChip(
    name="7x",
    topology="tpu7x:2x2x1",
    vmem_bytes=64 * _MIB,
    num_cores=1,
    mxu_size=256,
    mxus_per_core=2,
    flops_per_mxu_cycle=_MXU_256,
    peak_flops=2.307e15 / 2,
    int8=False,
    float8=_BOTH,
)
CHIPS = {chip.name: chip for chip in (_V4, _V5E, _V5P, _V6E, _7X)}
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


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def find_largest_divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n that is not above ``most``; 1 at least."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)


class ChipDevice(Protocol):
    """A device, or what a mesh without devices says of its own."""

    @property
    def device_kind(self) -> str: ...

    @property
    def platform(self) -> str: ...


def get_mesh_device() -> ChipDevice | None:
    """Returns what the devices of the mesh in use are, which need not be here; None:
    there is no mesh, or its devices are not known while the program is traced."""
    return jax.sharding.get_abstract_mesh().abstract_device


def get_mesh_platform() -> str | None:
    """Returns the platform of the mesh in use, whose devices need not be here: "cpu",
    "gpu" or "tpu"; None where there is none."""
    device = get_mesh_device()
    return None if device is None else _normalize_platform(device.platform)


def get_platform() -> str:
    """Returns the platform that the traced program is for: of the mesh, else the
    default device."""
    mesh_platform = get_mesh_platform()
    if mesh_platform is not None:
        return mesh_platform
    # A device, or the name of a platform.
    config: Any = jax.config  # whose attributes a type checker does not see
    default_device = config.jax_default_device
    if default_device is None:
        return jax.default_backend()
    if isinstance(default_device, str):
        return _normalize_platform(default_device)
    return _normalize_platform(default_device.platform)


def _normalize_platform(platform: str) -> str:
    """Returns "gpu" for what JAX calls "cuda" in places."""
    return "gpu" if platform == "cuda" else platform


def choose_backend(
    backend: str | None,
    kernels: Mapping[str, tuple[str, ...]],
    supports: Callable[[str], bool],
    description: str,
) -> str:
    """Returns the name of the implementation to run, "xla" where no kernel supports
    this.

    Args:
        backend: a key of ``kernels``; None: what the program being traced is for.
        kernels: the kernels to try for each backend, in order.
        supports: whether a kernel supports this.
        description: of what is computed, for messages.

    Raises:
        ValueError: a backend that is not known, or whose kernels do not support this.
    """
    if backend is not None and backend not in kernels:
        raise ValueError(f"backend={backend!r}: known are {', '.join(kernels)}")
    for name in kernels.get(backend or get_platform(), ()):
        if supports(name):
            return name
    if backend in (None, "xla"):
        return "xla"
    raise ValueError(f"no {backend} kernel for {description}")


def get_chip() -> TpuChip:
    """Returns the TPU that the traced program is for: of the mesh in use, else this
    machine's; where that is no TPU, the one with the least VMEM."""
    device = get_mesh_device()
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return CHIPS[_SMALLEST] if device is None else find_chip(device)


def find_chip(device: ChipDevice) -> TpuChip:
    """Returns a device's chip; the one with the least VMEM where its kind is not
    known."""
    return CHIPS[_KINDS.get(device.device_kind, _SMALLEST)]
