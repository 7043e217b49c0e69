"""The GPU's kernel, interpreted on CPU, equals float64 attention over each row's own
tokens."""

import pytest

from pallas_kernels.paged_attention.triton import TritonPagedBlocks
from tests.pallas_kernels.paged_cases import DEAD, PagedCase, check
from tests.pallas_kernels.test_paged_attention import (
    CHUNKS,
    DECODE,
    FEATURES,
    check_independence,
)

TRITON = {
    "backend": "triton",
    "block_sizes": TritonPagedBlocks(8, 32, 3),
    "interpret": True,
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
    "latent, the same parts": PagedCase(
        DECODE, (4, 1, 48, 32), num_uniform=5, latent=True
    ),
    "bf16": PagedCase(DECODE + CHUNKS, num_uniform=5, kind="bfloat16"),
    "int8": PagedCase(DECODE + CHUNKS, num_uniform=5, kind="int8"),
    "int8 with zeros, latent": PagedCase(
        DECODE, (4, 1, 56, 40), num_uniform=5, kind="int8 with zeros", latent=True
    ),
    "int4": PagedCase(
        DECODE + CHUNKS, (3, 3, 16, 24), 32, num_uniform=5, kind="int4", window=40
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(case):
    check(CASES[case], tolerance=3e-2 if case == "bf16" else 2e-5, **TRITON)


@pytest.mark.heavy
def test_other_rows_change_nothing():
    check_independence(TRITON)
