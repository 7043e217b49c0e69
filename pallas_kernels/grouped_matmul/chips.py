"""What of a TPU decides the blocks that its kernels work on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MIB = 1 << 20


class Chip(NamedTuple):
    """A TPU core, as Google Cloud's pages and JAX's ``TpuInfo`` describe it."""

    vmem: int
    """Bytes."""
    cores: int
    """Cores that share a kernel's grid."""
    mxu: int
    """Rows and columns of its matrix unit."""
    int8: bool
    """Whether it multiplies int8, ..."""
    float8: tuple[Any, ...] = ()
    """... and which 8-bit floats; others are widened to bf16, which holds them exactly."""

    def multiplies(self, left: Any, right: Any) -> bool:
        """Operands of these types as they are."""
        if {jnp.dtype(d).itemsize for d in (left, right)} != {1}:
            return left == right
        if jnp.int8 in (left, right):
            return left == right and self.int8
        return left in self.float8 and right in self.float8


_V5P = Chip(64 * _MIB, 2, 128, True, (jnp.float8_e5m2,))
_V5E = Chip(128 * _MIB, 1, 128, True, (jnp.float8_e5m2,))
_V6E = Chip(128 * _MIB, 1, 256, True, (jnp.float8_e5m2,))
_V7X = Chip(64 * _MIB, 1, 256, False, (jnp.float8_e4m3fn, jnp.float8_e5m2))
_V4 = Chip(16 * _MIB, 2, 128, False)
# By ``Device.device_kind``.
_CHIPS = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
}


def current_platform() -> str | None:
    """Of the devices that the program being traced is for, "cpu", "gpu" or "tpu": the current
    mesh's. None where there is no mesh of devices to tell."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def current_chip() -> Chip:
    """The TPU that the program being traced is for: the current mesh's, else this machine's, else
    the one whose blocks fit all."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return _V4 if device is None else _CHIPS.get(device.device_kind, _V4)
