"""Which batch each step takes: against a run played out batch by batch."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from maxlm.checkpoint.skips import contiguous_ranges, get_batch_index, has_same_batches

ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 15)).map(
        lambda pair: (pair[0], sum(pair))
    ),
    max_size=6,
).map(tuple)


def played(steps, skips):
    """The batches of a run that looks at each in turn, and takes those not left out."""
    out = {number for first, last in skips for number in range(first, last + 1)}
    return [n for n in range(steps + 200) if n not in out][:steps]


@given(st.integers(0, 80), ranges)
def test_batches_are_those_that_are_not_left_out(steps, skips):
    assert [get_batch_index(step, skips) for step in range(steps)] == played(
        steps, skips
    )


@given(st.integers(0, 40), st.integers(0, 40), ranges)
def test_stretches_are_the_same_batches_in_runs(start, more, skips):
    found = list(contiguous_ranges(start, start + more, skips))
    numbers = [
        number for first, count in found for number in range(first, first + count)
    ]
    assert numbers == played(start + more, skips)[start:]
    gaps = [b - (a + n) for (a, n), (b, _) in pairwise(found)]
    assert all(count > 0 for _, count in found)
    assert all(gap >= 0 for gap in gaps)


@given(st.integers(0, 60), ranges, ranges)
def test_the_same_batches_are_told_from_others(step, one, other):
    assert has_same_batches(step, one, other) == (
        played(step, one) == played(step, other)
    )


def test_a_second_range_may_hold_the_first():
    # Back to step 8 after batches 10 to 12 were left out: 8 to 17 go as well.
    assert [get_batch_index(step, ((10, 12), (8, 17))) for step in (7, 8, 9)] == [
        7,
        18,
        19,
    ]
