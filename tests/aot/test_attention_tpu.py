"""The TPU's attention kernels compile for chips that are not here, each feature among
them, with blocks by rule and within the VMEM that they ask for."""

from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention as kernel
from pallas_kernels.chips import CHIPS, get_chip
from tests.aot.conftest import attention_operands, describe_device, read_kernels

pytestmark = pytest.mark.timeout(900)


class AttentionCase(NamedTuple):
    shape: tuple[int, ...]
    """B, S, T, N, K, H, Hv."""
    static: dict[str, Any]
    arrays: tuple[str, ...] = ()
    """Options that are arrays."""
    dtype: Any = jnp.bfloat16


CASES = {
    "causal": AttentionCase((1, 4096, 4096, 2, 2, 128, 128), {}),
    "packed, grouped heads, sinks, H 64": AttentionCase(
        (2, 512, 512, 8, 2, 64, 64), {}, ("segment_ids", "sinks")
    ),
    "window, latent heads": AttentionCase(
        (1, 512, 1024, 2, 2, 192, 128), {"window": 500, "q_offset": 512}
    ),
    "prefix, cap, slopes, odd lengths, H 80": AttentionCase(
        (2, 500, 500, 2, 2, 80, 80), {"soft_cap": 30.0}, ("prefix", "slopes")
    ),
    "full, cross, packed, H 96": AttentionCase(
        (2, 700, 1500, 2, 1, 96, 96), {"causal": False}, ("segment_ids",)
    ),
    "full, odd lengths, H 256": AttentionCase(
        (1, 520, 1300, 1, 1, 256, 256), {"causal": False}
    ),
    "traced offsets, window, packed": AttentionCase(
        (1, 512, 2048, 2, 1, 128, 128),
        {"window": 500},
        ("q_offset", "k_offset", "segment_ids"),
    ),
    "fp32, everything, H 32": AttentionCase(
        (1, 640, 900, 4, 2, 32, 32),
        {"window": 300, "soft_cap": 5.0},
        ("q_offset", "prefix", "segment_ids", "slopes", "sinks"),
        jnp.float32,
    ),
    "many keys, sinks": AttentionCase(
        (1, 1024, 32768, 2, 1, 128, 128), {"q_offset": 31744}, ("sinks",)
    ),
}
# A v4's VMEM holds few keys: two parts or more of these, and each is a kernel to
# compile.
MANY_ON_V4 = AttentionCase(
    (1, 1024, 8192, 2, 1, 128, 128), {"q_offset": 7168}, ("sinks",)
)


@cache
def mesh(chip: str) -> Mesh:
    """Of one of a chip's devices, where nothing can run."""
    devices = [describe_device(CHIPS[chip].topology)]
    return jax.make_mesh(
        (1,), ("one",), devices=devices, axis_types=(AxisType.Explicit,)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", CHIPS)
def test_both_passes_compile(chip, case):
    chosen = MANY_ON_V4 if (chip, case) == ("v4", "many keys, sinks") else CASES[case]
    here = NamedSharding(mesh(chip), PartitionSpec())
    arguments = attention_operands(chosen.shape, chosen.dtype, chosen.arrays, here)

    def run(q, k, v, d_o, options):
        def attend(q, k, v):
            return kernel.attention(q, k, v, backend="tpu", **chosen.static, **options)

        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(d_o)

    with jax.set_mesh(mesh(chip)):
        assert get_chip() == CHIPS[chip]
        text = jax.jit(run).lower(*arguments).compile().as_text()
    kernel_counts = Counter(read_kernels(chip, text))
    assert set(kernel_counts) == {"attention_forward", "attention_backward"}
    parts = max(kernel_counts.values())
    if case == "many keys, sinks":
        assert (parts > 1) == (chip in PARTS)
    elif chip != "v4":
        assert parts == 1


# Chips whose VMEM does not hold the many keys and values of a head, with sums of their
# gradients. A v4's holds few of anything.
PARTS = ("v4", "v5p", "7x")
