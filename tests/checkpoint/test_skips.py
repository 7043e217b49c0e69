"""Which batch each step takes: against a run played out batch by batch."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from maxlm.checkpoint.skips import contiguous_ranges, get_batch_index, has_same_batches

# (first, last), both left out.
a_range = st.builds(
    lambda first, more: (first, first + more), st.integers(0, 60), st.integers(0, 15)
)
ranges = st.lists(a_range, max_size=6).map(tuple)


def played(steps, skips):
    """The batches of a run that looks at each in turn, and takes those not left out."""
    out = {number for first, last in skips for number in range(first, last + 1)}
    return [n for n in range(steps + 200) if n not in out][:steps]


@given(st.integers(0, 80), ranges)
def test_batches_are_those_that_are_not_left_out(steps, skips):
    batches = [get_batch_index(step, skips) for step in range(steps)]
    assert batches == played(steps, skips)


@given(st.integers(0, 40), st.integers(0, 40), ranges)
def test_stretches_are_the_same_batches_in_runs(start, more, skips):
    stretches = list(contiguous_ranges(start, start + more, skips))
    numbers = []
    for first, count in stretches:
        assert count > 0
        numbers += range(first, first + count)
    assert numbers == played(start + more, skips)[start:]
    for (first, count), (next_first, _) in pairwise(stretches):
        assert next_first >= first + count


@given(st.integers(0, 60), ranges, ranges)
def test_the_same_batches_are_told_from_others(step, one, other):
    expected = played(step, one) == played(step, other)
    assert has_same_batches(step, one, other) == expected


def test_a_second_range_may_hold_the_first():
    # Back to step 8 after batches 10 to 12 were left out: 8 to 17 go as well.
    skips = ((10, 12), (8, 17))
    batches = [get_batch_index(step, skips) for step in (7, 8, 9)]
    assert batches == [7, 18, 19]
