"""How often each bundle of a kernel runs: its control flow, executed.

A kernel's loops and branches hang on its scalar unit alone: grid indices, trip counts,
and what was prefetched to scalar memory (tables of blocks, group sizes).
:func:`run_counts` executes those instructions of the final schedule, so that counts are
those of the program that the compiler made, whatever it unrolled, pipelined or turned
into predicates; vector instructions only pass by.

Assumed, and refused where it does not hold: no branch hangs on what a vector unit
computed, or on scalars whose values were not given.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.kernel_cycles.static.scalar import (
    OPERAND,
    UNKNOWN,
    Unknown,
    bundle_lines,
    instructions,
    signed,
)
from benchmarks.kernel_cycles.static.schedule import Schedule

MAX_RUNS = 1 << 26
"""Of a loop's body, before it counts as endless."""

# Where the runtime puts the core's index: a word of scalar memory.
_CORE_INDEX = 1

_TARGET = re.compile(r"target bundleno = (\d+)")


@dataclass(frozen=True)
class _Block:
    start: int
    stop: int
    target: int | None
    """Of the branch that ends it."""


def run_counts(
    schedule: Schedule,
    core: int = 0,
    operands: Mapping[int, np.ndarray] | None = None,
) -> np.ndarray:
    """Times each bundle runs, int64 [bundles].

    Args:
        core: of those that share a device, which one.
        operands: inputs that the kernel copies to scalar memory, by index: their bytes,
            in the order of their layout there, as uint32 words.

    Raises:
        ValueError: a branch that hangs on values not given, an unknown branch, an
            endless loop.
    """
    blocks = _blocks(schedule)
    source = _program(schedule, blocks)
    memory: dict[int, Any] = {_CORE_INDEX: core}
    divide, pop = _divider()
    names: dict[str, Any] = {
        "divide": divide,
        "pop": pop,
        "M": 0xFFFFFFFF,
        "UNKNOWN": UNKNOWN,
        "Unknown": Unknown,
        "signed": signed,
        "copy": _copier(memory, operands or {}),
        "scalar": lambda i: (
            int(operands[i][0]) if operands and i in operands else UNKNOWN
        ),
        "load": lambda a: UNKNOWN if isinstance(a, Unknown) else memory.get(a, UNKNOWN),
        "store": _storer(memory),
    }
    exec(compile(source, schedule.name, "exec"), names)
    runs, stuck = names["run"]()
    if stuck is not None:
        raise ValueError(
            f"{schedule.name}: the branch after bundle {blocks[stuck].stop} hangs on a "
            f"value that "
            "its scalar unit does not compute, or on an operand whose values were not "
            "given"
        )
    counts = np.zeros(len(schedule.bundles), np.int64)
    for block, times in zip(blocks, runs, strict=True):
        counts[block.start : block.stop] += times
    return counts


def knows_core(schedule: Schedule) -> bool:
    """Whether it looks up which core runs it; one that does not is not split over
    cores."""
    index = [
        tag for tag, at in schedule.scalar_memory.items() if at == (_CORE_INDEX, True)
    ]
    return any(
        f"sld [smem:[#{tag}]]" in text for tag in index for text in schedule.bundles
    )


def _blocks(schedule: Schedule) -> list[_Block]:
    """Bundles cut where a branch leads or, its delay past, leaves."""
    branches: dict[int, int] = {}
    for at, bundle in enumerate(schedule.bundles):
        for _, operation, rest in instructions(bundle):
            if operation.startswith(("sbr", "scall", "sret")):
                target = _TARGET.search(rest)
                if operation != "sbr.rel" or target is None:
                    raise ValueError(
                        f"{schedule.name}: cannot follow the branch {operation} {rest}"
                    )
                branches[at + 1 + schedule.branch_delay] = int(target[1])
    end = len(schedule.bundles)
    cuts = sorted({0, end, *branches, *branches.values()})
    for before, cut in pairwise(cuts):
        if cut in branches and cut - before <= schedule.branch_delay:
            raise ValueError(
                f"{schedule.name}: two branches overlap before bundle {cut}"
            )
    return [_Block(a, b, branches.get(b)) for a, b in pairwise(cuts) if a < end]


def _program(schedule: Schedule, blocks: list[_Block]) -> str:
    """Python that does what the scalar unit does.

    Executed rather than interpreted: a grid of 32,768 steps has tens of millions of
    instructions.
    """
    index = {block.start: i for i, block in enumerate(blocks)}
    registers = set()
    body = []
    for i, block in enumerate(blocks):
        lines = [f"n[{i}] += 1"]
        for at in range(block.start, block.stop):
            lines += bundle_lines(schedule, at, registers)
        following = index.get(block.stop, -1)
        if block.target is None:
            lines.append(f"b = {following}")
        else:
            target = index.get(block.target, -1)
            lines += [
                "if isinstance(branch, Unknown):",
                f"    return n, {i}",
                f"b = {target} if branch else {following}",
            ]
        if block.target is not None and block.target <= block.start:
            message = (
                f"{schedule.name}: the loop that ends at bundle {block.stop} has no end"
            )
            lines += [f"if n[{i}] > {MAX_RUNS}:", f"    raise ValueError({message!r})"]
        body += [f"if b == {i}:", *(f"    {line}" for line in lines)]
    start = [f"{r} = UNKNOWN" for r in sorted(registers)]
    lines = [
        f"n = [0] * {len(blocks)}",
        "b = 0",
        "branch = 0",
        *start,
        "while b >= 0:",
        *(f"    {line}" for line in body),
        "return n, None",
    ]
    return "\n".join(["def run():", *(f"    {line}" for line in lines)])


def _divider() -> tuple[Callable[..., None], Callable[[], Any]]:
    """What pushes results, quotient before remainder, and what pops them."""
    queue: deque[Any] = deque()

    def divide(predicate: Any, a: Any, b: Any, results: str) -> None:
        known = not any(isinstance(x, Unknown) for x in (predicate, a, b)) and b
        for result_kind, at in (("Div", 0), ("Rem", 1)):
            if predicate and result_kind in results:
                queue.append(divmod(a, b)[at] if known else UNKNOWN)

    return divide, lambda: queue.popleft() if queue else UNKNOWN


def _storer(memory: dict[int, Any]) -> Callable[..., None]:
    def store(predicate: Any, address: Any, value: Any) -> None:
        if isinstance(address, Unknown):
            memory.clear()  # It may have been any.
        elif isinstance(predicate, Unknown):
            memory[address] = UNKNOWN
        elif predicate:
            memory[address] = value

    return store


def _copier(
    memory: dict[int, Any], operands: Mapping[int, np.ndarray]
) -> Callable[..., None]:
    def copy(predicate: Any, source: Any, granules: Any, target: Any) -> None:
        """From an operand's address to words of scalar memory, 32 bytes a granule."""
        if isinstance(target, Unknown) or isinstance(granules, Unknown):
            memory.clear()
        elif isinstance(predicate, Unknown) or predicate:
            data = ()
            start = 0
            if not (isinstance(predicate, Unknown) or isinstance(source, Unknown)):
                data = operands.get(source // OPERAND - 1, ())
                start = source % OPERAND * 8
            for i in range(granules * 8):
                inside = start + i < len(data)
                memory[target + i] = int(data[start + i]) if inside else UNKNOWN

    return copy
