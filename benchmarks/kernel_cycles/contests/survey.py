"""Attention of every shape on several chips, beside its peers: what the table of it is
made from.

The peers come first: their programs do not follow from this package's kernels, so that
a cache keeps them when those change.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.kernel_cycles.contests.contest import (
    Benchmark,
    Contender,
    Measure,
    Outcome,
    Pass,
    Row,
    contest,
)
from benchmarks.kernel_cycles.static.measure import Spec
from benchmarks.kernel_cycles.static.problems import Shape


class ContestCell(NamedTuple):
    """Of the table."""

    shape: Shape
    chip: str
    direction: str

    def __str__(self) -> str:
        return f"{self.chip} {self.shape} {self.direction}"


class _Contest(NamedTuple):
    cell: ContestCell
    of: Pass
    contenders: Sequence[Contender]

    def known(self, known: Callable[[Spec, str], bool]) -> bool:
        """Whether what it tries first is."""
        specs = [spec for c in self.contenders for spec in c.programs[self.of.name][:1]]
        return all(known(spec, self.cell.chip) for spec in specs)


Results = Mapping[ContestCell, Mapping[str, Outcome]]
"""By contender."""


def survey(
    problems: Mapping[Shape, Benchmark],
    chips: Sequence[str],
    measure: Measure,
    known: Callable[[Spec, str], bool],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Hold all contests.

    Args:
        known: whether ``measure`` has a program's costs at hand.
        say: told of each contest, with their count and the time left.
    """
    contests = _contests(problems, chips)
    results: dict[ContestCell, dict[str, Outcome]] = {}
    spent: list[float] = []
    for count, one in enumerate(contests, 1):
        fresh = not one.known(known)
        start = clock()
        outcomes_by_name = contest(one.contenders, one.of, one.cell.chip, measure)
        results.setdefault(one.cell, {}).update(outcomes_by_name)
        if fresh:
            spent.append(clock() - start)
        left = sum(not c.known(known) for c in contests[count:]) if spent else 0
        outcomes = ", ".join(
            f"{name} {_brief(o)}" for name, o in outcomes_by_name.items()
        )
        say(f"[{count}/{len(contests)}] {one.cell}: {outcomes}{time_left(spent, left)}")
    return results


def _contests(
    problems: Mapping[Shape, Benchmark], chips: Sequence[str]
) -> list[_Contest]:
    contests = []
    for peer in (True, False):
        for shape, benchmark in problems.items():
            contenders = [c for c in benchmark.contenders if c.peer == peer]
            contests += [
                _Contest(ContestCell(shape, chip, of.name), of, contenders)
                for chip in chips
                for of in benchmark.passes
                if contenders
            ]
    return contests


def time_left(spent: Sequence[float], left: int) -> str:
    """In words: as many contests as are ``left`` at the mean of those ``spent``
    seconds."""
    if not left or not spent:
        return ""
    return f"; about {left * sum(spent) / len(spent) / 60:.0f} min left"


def _brief(outcome: Outcome) -> str:
    return f"{outcome.microseconds:.1f} µs" if isinstance(outcome, Row) else "—"
