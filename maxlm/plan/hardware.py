"""What a device can do."""

import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bf16 peak, FLOP/s, by the name JAX gives the device.
PEAK_FLOPS = {
    "TPU v4": 2.75e14,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 1.97e14,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 4.59e14,  # cloud.google.com/tpu/docs/v5p
    "TPU v6 lite": 9.18e14,  # cloud.google.com/tpu/docs/v6e
    "NVIDIA H100": 9.89e14,  # NVIDIA H100 datasheet, SXM, without sparsity
    "NVIDIA H200": 9.89e14,  # NVIDIA H200 datasheet, SXM, without sparsity
    "NVIDIA A100": 3.12e14,  # NVIDIA A100 datasheet, without sparsity
}


def peak_flops(device: Any) -> float | None:
    """A device's peak in FLOP/s; for a CPU, what one large fp32 matmul reaches now; or unknown."""
    if device.platform == "cpu":
        return _measured_matmul(device)
    kind = device.device_kind
    found = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def _measured_matmul(device: Any, size: int = 1024, rounds: int = 5) -> float:
    multiply, times = jax.jit(jnp.matmul), []
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply(a, a).block_until_ready()
    for _ in range(rounds):
        began = time.perf_counter()
        multiply(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    # Several virtual CPU devices share the same cores.
    return 2 * size**3 / min(times) / len(device.client.local_devices())
