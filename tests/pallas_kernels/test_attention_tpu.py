"""The TPU attention kernels, in the interpreter, equal a float64 NumPy softmax."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention as kernel
from pallas_kernels.attention.tpu_blocks import Blocks, BlockSizes
from tests.pallas_kernels.cases import Case, cases, check

SMALL = BlockSizes(Blocks(128, 128, 128, 128), Blocks(128, 128, 128, 128))
# Forward and backward; block of queries, of keys, tiles, tiles ahead, staged.
BLOCKS = (
    SMALL,
    BlockSizes(Blocks(256, 128, 128, 128), Blocks(256, 128, 128, 128)),
    BlockSizes(Blocks(256, 256, 128, 128, 1, False), Blocks(256, 256, 128, 128, 2)),
    BlockSizes(Blocks(128, 256, 128, 128, 2), Blocks(128, 256, 128, 128, 3)),
    BlockSizes(Blocks(256, 256, 128, 256, 2, True), Blocks(256, 256, 256, 128)),
    BlockSizes(Blocks(256, 256, 256, 128, 2, False), Blocks(256, 128, 256, 128, 2)),
)
# Memory that nobody wrote holds NaN, and reads past the end of an array are errors.
POISONED = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


def check_tpu(case: Case, blocks: BlockSizes, interpret=True, **more) -> None:
    options = {"backend": "tpu", "block_sizes": blocks, "interpret": interpret}
    forward = partial(kernel.attention_forward, **options)
    check(forward, partial(kernel.attention_backward, **options), case, **more)


DRAWN = cases(
    lengths=(1, 100, 128, 129, 200, 256, 300),
    heads=((1, 1), (2, 2), (4, 2), (3, 1)),
    head_sizes=((8, 8), (9, 5), (130, 130), (3, 140)),
    places=("default", "default", "static", "traced"),
)


@settings(max_examples=16)
@given(DRAWN, st.sampled_from(BLOCKS))
def test_every_kind_equals_the_reference(case, blocks):
    check_tpu(case, blocks)


ALL = {"window": 150, "prefix": True, "packed": True, "soft_cap": 2.0, "slopes": True}


@pytest.mark.parametrize("place", ["static", "traced"])
def test_all_features_at_once(place):
    check_tpu(Case((2, 260, 300, 4, 2, 6, 9), place=place, sinks=True, **ALL), BLOCKS[1])
