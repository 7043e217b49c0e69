"""A problem, its passes, and those that contend in each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pallas_kernels.static.measure import Spec


@dataclass(frozen=True)
class Pass:
    """What is compared: a row of the table for each contender."""

    name: str
    flops: int
    """That the problem needs."""
    backward: bool | None = None
    """Of a program, the kernels that count: those that differentiation made (True), the others
    (False) or all (None)."""
    blocks: Sequence[str] = ()
    """Arguments of a program that the table shows: its block sizes."""


@dataclass(frozen=True)
class Contender:
    """A kernel, with the programs among which the fastest counts (block sizes), by pass."""

    name: str
    programs: Mapping[str, Sequence[Spec]]
    peer: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Contenders for one problem."""

    title: str
    contenders: Sequence[Contender]
    passes: Sequence[Pass]
