"""Which implementation an attention runs on.

An implementation is a module here with

- ``supports(q, k, v, where, how) -> bool``, of shapes and dtypes alone,
- ``forward(q, k, v, where, how, dtype, block_sizes=None, interpret=False) -> (o, lse)``,
- ``backward(q, k, v, lse, delta, d_o, where, how, dtype, block_sizes=None, interpret=False)
  -> (d_q, d_k, d_v)``, and the biases' gradient where it supports these,

imported when first wanted: each needs a part of Pallas that others do not.
"""

import importlib
from functools import partial
from typing import Any

import jax

from pallas_kernels.attention import xla
from pallas_kernels.attention.params import AttentionOperands, AttentionParams
from pallas_kernels.chips import get_platform

XLA = "xla"
# What `backend` may be, and the kernels to try for it in order. XLA takes what these do not.
KERNELS = {
    "tpu": ("tpu",),
    "gpu": ("hopper", "triton"),
    "hopper": ("hopper",),
    "triton": ("triton",),
    XLA: (),
}


def choose_backend(
    backend: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: AttentionOperands,
    params: AttentionParams,
) -> str:
    """Returns the implementation's name.

    Args:
        backend: a key of ``KERNELS``; None: what the program being traced is for.

    Raises:
        ValueError: a backend that is not known, or whose kernels do not support this.
    """
    if backend is not None and backend not in KERNELS:
        raise ValueError(f"backend={backend!r}: known are {', '.join(KERNELS)}")
    for name in KERNELS.get(backend or get_platform(), ()):
        if name == "hopper" and backend != "hopper" and not _on_hopper():
            continue
        if _module(name).supports(q, k, v, operands, params):
            return name
    if backend in (None, XLA):
        return XLA
    shapes = ", ".join(f"{x} {a.dtype} {a.shape}" for x, a in (("q", q), ("k", k), ("v", v)))
    raise ValueError(f"no {backend} kernel for {shapes} with {params}")


def bind_backend(name: str, **kernel_options: Any) -> tuple[Any, Any]:
    """Returns the forward and backward function of a backend, with the options of kernels."""
    module = xla if name == XLA else _module(name)
    options = {} if name == XLA else kernel_options
    return partial(module.forward, **options), partial(module.backward, **options)


def _on_hopper() -> bool:
    """Whether the GPU that the program is for has Hopper's instructions (compute capability 9.0,
    which a device that is not here does not tell)."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return any(card in device.device_kind for card in ("H100", "H20", "H800"))
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def _module(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.attention.{name}")
