"""A problem, its passes, and those that contend in each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.kernel_cycles.static.costs import CallCosts, KernelCosts
from benchmarks.kernel_cycles.static.measure import CompileError, Spec

FAR = 1.1
"""A peer that takes so many times as long as the best one tries no more block sizes."""

OWN = "pallas_kernels"
"""This package's contender."""

Measure = Callable[[Spec, str], CallCosts]


class CountError(Exception):
    """A count that cannot be right."""


@dataclass(frozen=True)
class Pass:
    """What is compared: a row of the table for each contender."""

    name: str
    flops: int
    """That the problem needs."""
    backward: bool | None = None
    """Of a program, the kernels that count: those that differentiation made (True), the
    others (False) or all (None)."""
    blocks: Sequence[str] = ()
    """Arguments of a program that the table shows: its block sizes."""


@dataclass(frozen=True)
class Contender:
    """A kernel, with the programs among which the fastest counts (block sizes), by
    pass."""

    name: str
    programs: Mapping[str, Sequence[Spec]]
    peer: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Contenders for one problem."""

    title: str
    contenders: Sequence[Contender]
    passes: Sequence[Pass]


@dataclass(frozen=True)
class Row:
    """A contender's program of a pass."""

    contender: Contender
    of: Pass
    spec: Spec
    costs: CallCosts

    @property
    def kernels(self) -> list[KernelCosts]:
        return [k for k in self.costs.kernels if self.of.backward in (None, k.backward)]

    @property
    def microseconds(self) -> float:
        return self.costs.microseconds(backward=self.of.backward)

    @property
    def mxu_flops(self) -> float:
        return self.costs.mxu_flops(backward=self.of.backward)

    @property
    def spill_stores(self) -> int:
        """In the inner loops, as scheduled."""
        return sum(loop.spill_stores for k in self.kernels for loop in k.inner_loops)


Outcome = Row | Exception
"""A contender's fastest program, or why there is none."""


def contest(
    contenders: Sequence[Contender], of: Pass, chip: str, measure: Measure
) -> dict[str, Outcome]:
    """Each contender's fastest program of a pass.

    Block sizes are tried in turns, a peer's first ones before another's second, so that
    those far behind (``FAR``) are left early.
    """
    outcomes: dict[str, Outcome] = {
        c.name: CompileError("no block sizes divide this problem") for c in contenders
    }
    turns = zip_longest(*(c.programs[of.name] for c in contenders))
    for specs in turns:
        for contender, spec in zip(contenders, specs, strict=True):
            if spec is not None and not _far(contender, outcomes):
                row = _row(contender, of, spec, chip, measure)
                outcomes[contender.name] = _better(outcomes[contender.name], row)
    return outcomes


def _row(
    contender: Contender, of: Pass, spec: Spec, chip: str, measure: Measure
) -> Outcome:
    try:
        row = Row(contender, of, spec, measure(spec, chip))
    except (CompileError, ValueError) as error:
        return error
    if not row.kernels:
        return CountError("no Pallas kernel in the program")
    if row.mxu_flops < 0.99 * of.flops:
        return CountError(
            f"{row.mxu_flops:.3g} FLOPs counted where {of.flops:.3g} are needed"
        )
    return row


def _better(a: Outcome, b: Outcome) -> Outcome:
    """The faster; of two reasons the last."""
    if isinstance(a, Row) and isinstance(b, Row):
        return min(a, b, key=lambda row: row.microseconds)
    return a if isinstance(a, Row) else b


def best_peer(outcomes: Mapping[str, Outcome]) -> Row | None:
    rows = [
        row for row in outcomes.values() if isinstance(row, Row) and row.contender.peer
    ]
    return min(rows, key=lambda row: row.microseconds, default=None)


def _far(contender: Contender, outcomes: Mapping[str, Outcome]) -> bool:
    best = best_peer(outcomes)
    outcome = outcomes[contender.name]
    return bool(
        best
        and contender.peer
        and isinstance(outcome, Row)
        and outcome.microseconds > FAR * best.microseconds
    )
