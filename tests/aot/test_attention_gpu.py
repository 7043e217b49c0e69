"""The GPU's attention kernels compile for cards that are not here, each feature among them, and
take no memory that grows with the square of the sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from maxlm.plan.topology import parse_topology
from maxlm.programs.compile import has_compiler, topology_devices
from pallas_kernels.attention import hopper, triton
from pallas_kernels.attention.how import How, Where

pytestmark = [
    pytest.mark.skipif(not has_compiler("gpu"), reason="the compiler is not installed"),
    pytest.mark.timeout(1800),
]

BF16, FP32, INT32 = jnp.bfloat16, jnp.float32, jnp.int32
B, N = 2, 8
# (S, T, K, H, Hv, dtype, how, arrays of where)
CASES: dict[str, tuple[Any, ...]] = {
    "causal": (4096, 4096, 2, 128, 128, BF16, {"causal": True}, ()),
    "full, odd lengths": (1000, 3001, 8, 64, 64, BF16, {}, ()),
    "window, sinks": (
        4096, 4096, 1, 80, 80, BF16, {"causal": True, "window": 1000}, ("sinks",),
    ),
    "MLA, packed": (
        4096, 4096, 8, 192, 128, BF16, {"causal": True}, ("q_segments", "k_segments"),
    ),
    "prefix, soft cap, slopes": (
        2048, 2048, 4, 256, 256, BF16, {"causal": True, "prefix": True, "soft_cap": 30.0},
        ("prefix", "slopes"),
    ),
    "positions": (
        2048, 2048, 4, 32, 32, jnp.float16, {"causal": True}, ("q_positions", "k_positions"),
    ),
    "fp32, an offset": (2000, 1000, 4, 96, 96, FP32, {"causal": True}, ("q_offset", "k_offset")),
}  # fmt: skip


def operands(S, T, K, H, Hv, dtype, how, names):
    shapes = {
        "q_positions": ((B, S), INT32),
        "k_positions": ((1, T), INT32),
        "q_segments": ((B, S), INT32),
        "k_segments": ((B, T), INT32),
        "q_offset": ((), INT32),
        "k_offset": ((), INT32),
        "prefix": ((B,), INT32),
        "slopes": ((N,), FP32),
        "sinks": ((N,), FP32),
    }
    where = Where(**{name: jax.ShapeDtypeStruct(*shapes[name]) for name in names})
    defaults = {"causal": False, "window": None, "prefix": False, "soft_cap": None}
    q, k, v, d_o = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in ((B, S, N, H), (B, T, K, H), (B, T, K, Hv), (B, S, N, Hv))
    )
    return (q, k, v, d_o, where), How(**defaults | how, scale=H**-0.5)


def compiled(kind: str, function, arguments):
    (device,) = topology_devices(parse_topology(f"{kind}x1"))
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    # The card that Pallas lowers for; without it, that of this machine.
    card = jax.sharding.AbstractDevice(device.device_kind, None, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
        return jax.jit(function).lower(*arguments).compile()


def both_passes(kernels, how, dtype):
    """A function of (q, k, v, d_o, where) that runs a module's forward and backward."""

    def run(q, k, v, d_o, where):
        o, lse = kernels.forward(q, k, v, where, how, dtype)
        delta = jnp.sum(o.astype(FP32) * d_o, axis=-1)
        return o, kernels.backward(q, k, v, lse, delta, d_o, where, how, dtype)

    return run


@pytest.mark.parametrize("kind", ["h100", "a100"])
@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_compile(case, kind):
    arguments, how = operands(*CASES[case])
    found = compiled(kind, both_passes(triton, how, arguments[0].dtype), arguments)
    temp = found.memory_analysis().temp_size_in_bytes
    print(f"{case}, {kind}: {temp:,} bytes of temporaries")
    S, T = arguments[0].shape[1], arguments[1].shape[1]
    assert temp < 0.05 * 4 * B * N * S * T


# Those that the Hopper kernels take, and one of 256, whose gradients are Triton's.
HOPPER: dict[str, tuple[Any, ...]] = {
    "causal": CASES["causal"],
    "full, odd lengths": (1000, 3000, 8, 64, 64, BF16, {}, ()),
    "window, sinks, packed": (
        4096, 4096, 2, 128, 128, jnp.float16, {"causal": True, "window": 1000},
        ("sinks", "q_segments", "k_segments"),
    ),
    "prefix, soft cap, slopes, an offset": (
        2048, 4096, 4, 128, 128, BF16, {"causal": True, "prefix": True, "soft_cap": 30.0},
        ("prefix", "slopes", "q_offset"),
    ),
    "256": (2048, 2048, 4, 256, 256, BF16, {"causal": True}, ()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_kernels_compile(case, dtype):
    """With results of the operands' width and, as a ring's steps want them, in fp32."""
    (q, k, v, d_o, where), how = operands(*HOPPER[case])
    assert hopper.supports(q, k, v, where, how)
    if hopper.supports_backward(q, k, v, where, how):
        run = both_passes(hopper, how, dtype)
    else:

        def run(q, k, v, d_o, where):
            return hopper.forward(q, k, v, where, how, dtype)

    found = compiled("h100", run, (q, k, v, d_o, where))
    temp = found.memory_analysis().temp_size_in_bytes
    print(f"{case}: {temp:,} bytes of temporaries")
    assert temp < 0.05 * 4 * B * N * q.shape[1] * k.shape[1]
