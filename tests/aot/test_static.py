"""Static cycles of kernels whose control flow is known, by the TPU's own compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.kernel_cycles.static import CHIPS, CompileError, Spec, measure
from benchmarks.kernel_cycles.static.measure import has_compiler

pytestmark = pytest.mark.skipif(
    not has_compiler(), reason="the compiler is not installed"
)

TRIPS = (5, 0, 7, 2)
N = 256


def looping(*, semantics: str, rows: int = 2 * N):
    """Matrix products, as many a grid step as a prefetched table says; one more where
    odd."""

    def kernel(trips, x, w, o):
        step = pl.program_id(0)
        o[...] = jnp.zeros_like(o)

        def multiply(i, _):
            some = x[pl.ds(pl.multiple_of(i * 16, 16), N), :]
            o[...] += jnp.dot(some, w[...], preferred_element_type=jnp.float32)

        lax.fori_loop(0, trips[step], multiply, None)

        @pl.when(trips[step] % 2 == 1)
        def _():
            multiply(3, None)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(len(TRIPS),),
        in_specs=[
            pl.BlockSpec((rows, N), lambda i, trips: (0, 0)),
            pl.BlockSpec((N, N), lambda i, trips: (0, 0)),
        ],
        out_specs=pl.BlockSpec((N, N), lambda i, trips: (i, 0)),
    )

    def program(trips, x, w):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((N * len(TRIPS), N), jnp.float32),
            grid_spec=grid,
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        )(trips + 1, x, w)

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, N), (N, N))]
    return program, (np.array(TRIPS, np.int32) - 1, *shapes)


@pytest.mark.parametrize(
    ("chip", "semantics"),
    [*((chip, "arbitrary") for chip in CHIPS), ("v5p", "parallel")],
)
def test_counted_products_are_those_of_the_loops(chip, semantics):
    """A parallel grid is split over the two cores of a v5p."""
    costs = measure(Spec(f"{__name__}:looping", {"semantics": semantics}), chip)
    (kernel,) = costs.kernels
    products = sum(TRIPS) + sum(t % 2 for t in TRIPS)
    assert costs.mxu_flops() == products * 2 * N**3
    assert kernel.cores == (2 if semantics == "parallel" else 1)
    if semantics == "arbitrary":
        runs = [loop.runs for loop in kernel.inner_loops]
        assert runs == [sum(TRIPS), sum(t % 2 for t in TRIPS)]
        assert kernel.cycles == sum(region.cycles for region in kernel.regions)


def test_a_peers_masked_blocks_are_not_counted():
    problem = {"batch": 1, "heads": 8, "seq": 1024, "head_dim": 128, "mask": "causal"}
    blocks = {"gradient": False, "forward": [256, 256, 256]}
    costs = measure(
        Spec("benchmarks.kernel_cycles.static.peers:jax_splash", problem | blocks),
        "v5p",
    )
    (kernel,) = costs.kernels
    (loop,) = kernel.inner_loops
    assert kernel.cores == 2
    assert loop.runs == 4 * (4 + 3 + 2 + 1)
    assert costs.mxu_flops() == 8 * 10 * 2 * 2 * 256 * 256 * 128


def test_what_the_compiler_refuses_is_said():
    with pytest.raises(CompileError, match=r"(?i)vmem"):
        measure(
            Spec(f"{__name__}:looping", {"semantics": "arbitrary", "rows": 1 << 16}),
            "v5e",
        )
