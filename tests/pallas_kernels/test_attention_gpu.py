"""The GPU kernels, interpreted on CPU, equal a float64 NumPy softmax with the same
mask."""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention as kernel
from pallas_kernels.attention import hopper, triton
from pallas_kernels.attention.params import AttentionOptions
from pallas_kernels.attention.triton_program import TritonTiles
from tests.pallas_kernels import reference
from tests.pallas_kernels.cases import Case, check

SMALL = triton.TritonBlockSizes(
    TritonTiles(32, 16, 4, 1), TritonTiles(16, 32, 4, 1), TritonTiles(16, 32, 4, 1)
)
TRITON = {"backend": "triton", "block_sizes": SMALL, "interpret": True}


def check_with(kernels, case, **bounds: float):
    forward, backward = (
        partial(f, **kernels)
        for f in (kernel.attention_forward, kernel.attention_backward)
    )
    check(forward, backward, case, **bounds)


ALL = {
    "window": 9,
    "prefix": True,
    "packed": True,
    "soft_cap": 2.0,
    "slopes": True,
    "sinks": True,
}
# Lengths and heads that no block divides, or all.
CASES = {
    "everything": Case((2, 50, 77, 4, 2, 16, 32), place="static", seed=10, **ALL),
    "window, sinks": Case(
        (2, 50, 77, 4, 2, 16, 16), window=21, sinks=True, place="traced", seed=11
    ),
    "MLA": Case((1, 33, 33, 2, 1, 192, 128)),
    "a query": Case((1, 1, 37, 3, 1, 80, 80), place="static", seed=0),
    "full": Case((1, 64, 64, 2, 2, 32, 32), causal=False),
    "bf16": Case((2, 96, 96, 4, 2, 32, 32), "bfloat16"),
    "packed, sinks": Case(
        (2, 50, 77, 4, 2, 16, 16), window=30, packed=True, sinks=True
    ),
    "full, slopes, packed": Case(
        (2, 45, 70, 4, 2, 40, 40), causal=False, slopes=True, packed=True
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_equal_the_reference(case):
    check_with(TRITON, CASES[case], rounding=0)


# Hopper's kernels.

INTERPRETED = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="no interpreter that knows these kernels",
)
HOPPER = {
    "causal, past the last block": Case(
        (1, 136, 264, 2, 1, 64, 64), "bfloat16", place="static", seed=5
    ),
    "everything": Case(
        (1, 152, 144, 2, 1, 64, 64),
        "bfloat16",
        place="traced",
        seed=10,
        **ALL | {"window": 90},
    ),
}


@INTERPRETED
@pytest.mark.parametrize("case", HOPPER)
def test_hopper_kernels_equal_the_reference_without_races(case):
    parameters = plgpu.InterpretGPUParams(detect_races=True)
    check_with({"backend": "hopper", "interpret": parameters}, HOPPER[case])


@INTERPRETED
def test_jax_differentiates_hopper_kernels_in_blocks_of_any_size():
    """In fp16, without a mask."""
    case = Case((1, 128, 128, 2, 1, 64, 64), "float16", causal=False)
    (q, k, v), d_o = case.arrays()
    sizes = hopper.HopperBlockSizes(64, 64, 128, 1)
    options = case.options() | {
        "backend": "hopper",
        "interpret": True,
        "block_sizes": sizes,
    }
    o, pull = jax.vjp(partial(kernel.attention, **options), q, k, v)
    wide = (x.astype(np.float64) for x in (q, k, v))
    expected = reference.attention(*wide, d_o=d_o.astype(np.float64), **case.options())
    for x, y in zip((o, *pull(d_o)), (expected[0], *expected[2:]), strict=True):
        assert x.dtype == np.float16
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=0.02)


def test_what_a_kernel_does_not_take_is_refused():
    def run(
        backend, H, k_dtype=jnp.bfloat16, S=128, **options: Unpack[AttentionOptions]
    ):
        q = jax.ShapeDtypeStruct((1, S, 2, H), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((1, 128, 2, H), k_dtype)
        jax.eval_shape(partial(kernel.attention, backend=backend, **options), q, k, k)

    positions = np.zeros((1, 128), np.int32)
    run("triton", 256, S=9)
    run("hopper", 256)
    for refused in (
        partial(run, "triton", 257),
        partial(run, "triton", 64, jnp.float32),
        partial(run, "triton", 64, q_positions=positions),
        partial(run, "triton", 64, biases=np.zeros((2, 7))),
        partial(run, "hopper", 80),
        partial(run, "hopper", 64, jnp.float32),
        partial(run, "hopper", 128, S=129),
        partial(run, "hopper", 64, q_positions=positions),
        partial(run, "hopper", 64, biases=np.zeros((2, 7))),
        partial(run, "tpu", 64, biases=np.zeros((2, 7))),
    ):
        with pytest.raises(ValueError, match=r"no \w+ kernel for q bfloat16"):
            refused()


@pytest.mark.heavy
def test_gradients_of_heads_of_256_are_by_triton_on_hopper_too():
    case = Case((1, 40, 48, 2, 1, 256, 256), "bfloat16", place="static", seed=9)
    (q, k, v), d_o = case.arrays()
    options = case.options()
    wide = (x.astype(np.float64) for x in (q, k, v))
    o, lse, *expected = reference.attention(
        *wide, d_o=d_o.astype(np.float64), **options
    )
    lse, delta = (x.astype(np.float32) for x in (lse, np.sum(o * d_o, axis=-1)))
    options |= {"backend": "hopper", "interpret": True}
    results = kernel.attention_backward(q, k, v, lse, delta, d_o, **options)
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=0.02)


def test_block_sizes_that_no_kernel_has_are_refused():
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    tiles = TritonTiles(64, 64, 4, 1)
    wrong = {
        "triton": triton.TritonBlockSizes(tiles, tiles._replace(k=48), tiles),
        "hopper": hopper.HopperBlockSizes(96, 64, 64, 2),
    }
    for backend, sizes in wrong.items():
        attend = partial(kernel.attention, backend=backend, block_sizes=sizes)
        with pytest.raises(ValueError, match=r"powers of two|multiples of 64"):
            jax.eval_shape(attend, q, q, q)
