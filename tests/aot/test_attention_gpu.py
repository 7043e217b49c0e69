"""The GPU's attention kernels compile for cards that are not here, each feature among
them, and take no memory that grows with the square of the sequence."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import attention as kernel
from tests.aot.conftest import attention_operands, describe_device

pytestmark = pytest.mark.timeout(1800)

BF16, FP32 = jnp.bfloat16, jnp.float32
B, N = 2, 8
# (S, T, K, H, Hv, dtype, static options, arrays among the options)
CASES: dict[str, tuple[Any, ...]] = {
    "causal": (4096, 4096, 2, 128, 128, BF16, {}, ()),
    "full, odd lengths": (1000, 3001, 8, 64, 64, BF16, {"causal": False}, ()),
    "window, sinks": (4096, 4096, 1, 80, 80, BF16, {"window": 1000}, ("sinks",)),
    "MLA, packed": (4096, 4096, 8, 192, 128, BF16, {}, ("segment_ids",)),
    "prefix, soft cap, slopes": (
        2048, 2048, 4, 256, 256, BF16, {"soft_cap": 30.0}, ("prefix", "slopes"),
    ),
    "fp16": (2048, 2048, 4, 32, 32, jnp.float16, {}, ()),
    "fp32, offsets": (2000, 1000, 4, 96, 96, FP32, {"k_offset": 7}, ("q_offset",)),
}  # fmt: skip


def compile_passes(kind, static, sizes, names, dtype):
    """The program of output and gradients in ``dtype``, which takes no memory to speak
    of."""
    device = describe_device(f"{kind}x1")
    S, T, K, H, Hv, operand_dtype = sizes
    shape = (B, S, T, N, K, H, Hv)
    arguments = attention_operands(
        shape, operand_dtype, names, SingleDeviceSharding(device)
    )

    def run(q, k, v, d_o, arrays):
        options = {**static, **arrays}
        o, lse = kernel.attention_forward(q, k, v, dtype=dtype, **options)
        delta = kernel.compute_row_delta(o, d_o)
        return o, kernel.attention_backward(
            q, k, v, lse, delta, d_o, dtype=dtype, **options
        )

    # The card that Pallas lowers for; without it, that of this machine.
    card = jax.sharding.AbstractDevice(device.device_kind, None, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
        compiled = jax.jit(run).lower(*arguments).compile()
    scores_bytes = 4 * B * N * S * T  # In fp32: what attention without tiles holds.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * scores_bytes
    return compiled


@pytest.mark.parametrize("kind", ["h100", "a100"])
@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_compile(case, kind):
    *sizes, static, names = CASES[case]
    compile_passes(kind, {**static, "backend": "triton"}, sizes, names, sizes[-1])


# Those that the Hopper kernels take, and one of 256, whose gradients are Triton's.
HOPPER: dict[str, tuple[Any, ...]] = {
    "causal": CASES["causal"],
    "full, odd lengths": (1000, 3000, 8, 64, 64, BF16, {"causal": False}, ()),
    "window, sinks, packed": (
        4096, 4096, 2, 128, 128, jnp.float16, {"window": 1000}, ("sinks", "segment_ids"),
    ),
    "prefix, soft cap, slopes, offsets": (
        2048, 4096, 4, 128, 128, BF16, {"soft_cap": 30.0, "k_offset": 8},
        ("prefix", "slopes", "q_offset"),
    ),
    "256": (2048, 2048, 4, 256, 256, BF16, {}, ()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_kernels_compile(case, dtype):
    """Chosen by the card. With results of the operands' width and, as a ring's steps
    want them, in fp32."""
    *sizes, static, names = HOPPER[case]
    compiled = compile_passes("h100", static, sizes, names, dtype)
    targets = " ".join(re.findall(r'custom_call_target="([^"]*)"', compiled.as_text()))
    assert "mosaic_gpu" in targets
    assert ("triton" in targets) == (case == "256")
