"""Batches left out of a run, and which batch a step takes.

A run that goes back leaves out the batches that led it astray. They are recorded as ranges of batch
numbers, in the order of their finding; the batch of any step follows from them alone, so that a run
which is started again, on any machine, takes the same ones.
"""

from collections.abc import Iterator, Sequence

Range = tuple[int, int]
"""First and last batch left out, counted from 0."""
Skips = tuple[Range, ...]


def _merged(skips: Sequence[Range]) -> Iterator[Range]:
    """The same batches as ranges in order that do not touch."""
    first, last = 0, -2
    for one, other in sorted(skips):
        if one > last + 1:
            if last >= first:
                yield first, last
            first, last = one, other
        last = max(last, other)
    if last >= first:
        yield first, last


def batch_number(step: int, skips: Sequence[Range]) -> int:
    """Number of the batch that is taken after ``step`` updates; with none left out, ``step``."""
    number = step
    for first, last in _merged(skips):
        if first > number:
            break
        number += last - first + 1
    return number


def stretches(start: int, stop: int, skips: Sequence[Range]) -> Iterator[tuple[int, int]]:
    """(first batch, how many) of each run of consecutive batches, of the updates after ``start``
    to ``stop``."""
    step = start
    while step < stop:
        number = batch_number(step, skips)
        ends = [first - number for first, _ in skips if first > number]
        count = min([stop - step, *ends])
        yield number, count
        step += count


def same_batches(step: int, one: Sequence[Range], other: Sequence[Range]) -> bool:
    """Whether ``step`` updates took the same batches under both."""
    return list(stretches(0, step, one)) == list(stretches(0, step, other))
