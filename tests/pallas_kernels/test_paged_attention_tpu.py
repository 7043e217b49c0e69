"""The TPU's kernel, in the interpreter, equals float64 attention over each row's own
tokens."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu import TpuPagedBlocks
from tests.pallas_kernels.paged_cases import DEAD, PagedCase, check
from tests.pallas_kernels.test_paged_attention import (
    CHUNKS,
    DECODE,
    FEATURES,
    check_independence,
)

pytestmark = pytest.mark.heavy

POISONED = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise"
)
TPU = {
    "backend": "tpu",
    "block_sizes": TpuPagedBlocks(8, 64, 64),
    "interpret": POISONED,
}
CASES = {
    "nobody": PagedCase([DEAD, DEAD], num_uniform=2),
    "ragged, sinks": PagedCase(CHUNKS, padding=5, sinks=True),
    "mixed, everything": PagedCase(
        DECODE + CHUNKS, (8, 1, 24, 40), 32, 5, padding=3, window=40, seed=1, **FEATURES
    ),
    "several tokens, limits": PagedCase(
        [(37, 3), (0, 3), (3, 3), (90, 3)],
        (9, 3, 16, 16),
        num_uniform=4,
        limited=True,
        sinks=True,
    ),
    "chunks of positions": PagedCase(
        DECODE + CHUNKS, (8, 2, 24, 40), num_uniform=5, window=30, chunk=24, sinks=True
    ),
    "latent": PagedCase(DECODE, (4, 1, 56, 40), num_uniform=5, latent=True),
    "bf16": PagedCase(DECODE + CHUNKS, num_uniform=5, kind="bfloat16"),
    "int8": PagedCase(DECODE, (4, 2, 16, 16), 32, 5, kind="int8"),
    "int8 with zeros, latent": PagedCase(
        DECODE, (4, 1, 56, 40), 32, num_uniform=5, kind="int8 with zeros", latent=True
    ),
    "int4": PagedCase(CHUNKS, (3, 3, 16, 24), 64, kind="int4", window=40),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(case):
    check(CASES[case], tolerance=3e-2 if case == "bf16" else 2e-5, **TPU)


def test_other_rows_change_nothing():
    check_independence(TPU)
