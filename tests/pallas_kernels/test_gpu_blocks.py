"""The GPU kernels visit the blocks that the mask leaves, and mask those that need
it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.gpu_blocks import BlockVisits
from pallas_kernels.attention.params import merge_offsets, validate_arguments
from tests.pallas_kernels import reference


def tables(S, T, block_q, block_k, options):
    """Of queries' visits to keys, and of keys' to queries."""
    rows = len(options.get("prefix", options.get("segment_ids", [[0]])[0]))
    operands, params = validate_arguments(
        *(jnp.zeros((rows, n, 1, 1)) for n in (S, T, T)), **options
    )
    sizes = (block_q, block_k, merge_offsets(operands, params), params)
    return [
        gpu_blocks.plan_visits(*sizes, per_query=per_query)
        for per_query in (True, False)
    ]


def visited(table) -> list[list[tuple[list[int], list[int]]]]:
    """(blocks with a mask, blocks without) that each block of each row visits."""
    visits = BlockVisits(*np.moveaxis(np.asarray(table), 2, 0)[..., None])
    masked = np.asarray(visits.masked_block(np.arange(32)))

    def of_block(b, i):
        count, begin, end = (
            int(x[b, i, 0])
            for x in (visits.num_masked, visits.full_begin, visits.full_end)
        )
        return masked[b, i, :count].tolist(), list(range(begin, end))

    return [
        [of_block(b, i) for i in range(table.shape[1])] for b in range(table.shape[0])
    ]


def judged(S, T, block_q, block_k, options):
    """bool [B, blocks of queries, blocks of keys]: whether any, whether all pairs are
    visible."""
    seen = reference.mask(S, T, **options)
    pad = (0, 0), (0, -S % block_q), (0, -T % block_k)
    some, whole = (
        np.pad(seen, pad, constant_values=fill).reshape(
            len(seen), -(-S // block_q), block_q, -1, block_k
        )
        for fill in (False, True)
    )
    return some.any(axis=(2, 4)), whole.all(axis=(2, 4))


PACKED = 2 * (np.repeat([[1, 2, 3, 4, 0]], [100, 200, 30, 100, 82], axis=1),)
WORK = {
    "causal": {},
    "window": {"window": 64},
    "prefix and window": {"window": 64, "prefix": np.array([70])},
    "packed, not causal": {"causal": False, "segment_ids": PACKED},
    "offsets": {"q_offset": 40, "k_offset": 140},
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", WORK)
def test_work_is_what_the_mask_leaves(case):
    """Blocks visited are those with a pair to see, masked those with a pair not to
    see."""
    some, whole = judged(512, 512, 32, 16, WORK[case])
    for table, axis in zip(tables(512, 512, 32, 16, WORK[case]), (1, 0), strict=True):
        counts = [[len(x) for x in runs] for runs in visited(table)[0]]
        np.testing.assert_array_equal(np.sum(counts, axis=1), some[0].sum(axis=axis))
        if case != "prefix and window":  # two runs of full blocks there: one is masked
            np.testing.assert_array_equal(
                [full for _, full in counts], (whole & some)[0].sum(axis=axis)
            )
