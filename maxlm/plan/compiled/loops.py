"""Trip counts of compiled loops."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from maxlm.plan.compiled.hlo import Computation, HloModule, Instruction

_KNOWN = re.compile(r'"?known_trip_count"?[^\d}]*"?n"?:"?(\d+)')
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "NE": operator.ne,
}
# What only moves or renames a value.
_MOVES = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "optimization-barrier")


def count_trips(loop: Instruction, caller: Computation, module: HloModule) -> int | None:
    """Returns the trips of a ``while``: as the compiler states them, else from its condition, where
    that compares a counter with a constant start and step to a constant; None where neither
    tells."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    condition, body = (module.computations[loop.calls(n)[0]] for n in ("condition", "body"))
    compare = _origin(_Place(condition, condition.root), module)
    sides = [_origin(place, module) for place in compare.operands()]
    holds = _COMPARISONS.get(compare.instruction.attribute("direction") or "")
    if holds is None or compare.instruction.opcode != "compare":
        return None
    starts, steps = [], []
    for side in sides:
        value = _integer(side.instruction)
        if value is not None:
            starts.append(value)
            steps.append(0)
        elif side.instruction.opcode == "get-tuple-element":
            index = side.instruction.integers("index")[0]
            starts.append(_start(loop, caller, index, module))
            steps.append(_step(body, index, module))
    if len(starts) != 2 or None in (*starts, *steps):
        return None
    return _count(holds, starts, steps)


def _count(holds: Callable[[int, int], bool], starts: list[int], steps: list[int]) -> int | None:
    """Trips until the comparison fails; None: it never does."""
    (a, b), closing = starts, steps[0] - steps[1]
    if not holds(a, b):
        return 0
    if not closing:
        return None
    # The first trip at which a - b, moving by `closing`, no longer compares as it did.
    near = max(abs(b - a) // abs(closing) - 1, 0)
    for trips in range(near, near + 4):
        if not holds(a + trips * steps[0], b + trips * steps[1]):
            return trips
    return None


@dataclass(frozen=True)
class _Place:
    """An instruction where it stands: within a fusion, beside what calls it."""

    computation: Computation
    name: str
    outer: "_Place | None" = None
    """The fusion that its computation is the inside of."""

    @property
    def instruction(self) -> Instruction:
        return self.computation.instructions[self.name]

    def operands(self) -> list["_Place"]:
        return [self.beside(name) for name in self.instruction.operands]

    def beside(self, name: str) -> "_Place":
        return _Place(self.computation, name, self.outer)


def _origin(place: _Place, module: HloModule) -> _Place:
    """Where a value comes from: past moves, into fusions and out of their parameters."""
    while True:
        found = place.instruction
        if found.opcode in _MOVES:
            place = place.beside(found.operands[0])
        elif found.opcode == "fusion":
            body = module.computations[found.calls("calls")[0]]
            place = _Place(body, body.root, place)
        elif found.opcode == "parameter" and place.outer is not None:
            outer, number = place.outer, int(found.literal)
            place = outer.beside(outer.instruction.operands[number])
        elif found.opcode == "get-tuple-element":
            whole = _origin(place.beside(found.operands[0]), module)
            if whole.instruction.opcode != "tuple":
                return place
            place = whole.operands()[found.integers("index")[0]]
        else:
            return place


def _start(loop: Instruction, caller: Computation, index: int, module: HloModule) -> int | None:
    """Returns the initial value of an element of the loop's tuple."""
    whole = _origin(_Place(caller, loop.operands[0]), module)
    if whole.instruction.opcode != "tuple":
        return None
    return _integer(_origin(whole.operands()[index], module).instruction)


def _step(body: Computation, index: int, module: HloModule) -> int | None:
    """By how much a trip moves an element of the tuple: a constant added to it, or taken off."""
    root = _origin(_Place(body, body.root), module)
    if root.instruction.opcode != "tuple":
        return None
    moved = _origin(root.operands()[index], module)
    if moved.instruction.opcode not in ("add", "subtract"):
        return None
    sides = [_origin(place, module).instruction for place in moved.operands()]
    if moved.instruction.opcode == "subtract":
        value = _integer(sides[1])
        return -value if value is not None and _is_element(sides[0], index) else None
    for one, other in (sides, sides[::-1]):
        if _is_element(one, index):
            return _integer(other)
    return None


def _is_element(instruction: Instruction, index: int) -> bool:
    return instruction.opcode == "get-tuple-element" and instruction.integers("index") == (index,)


def _integer(instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    return None
