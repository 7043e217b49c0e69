"""Trip counts of compiled loops."""

import re
from dataclasses import dataclass

from maxlm.plan.compiled.hlo import Computation, HloModule, Instruction

_KNOWN = re.compile(r'"?known_trip_count"?[^\d}]*"?n"?:"?(\d+)')
# What only moves or renames a value.
_MOVE_OPCODES = (
    "copy",
    "copy-start",
    "copy-done",
    "bitcast",
    "reshape",
    "optimization-barrier",
)


def count_trips(
    loop: Instruction, caller: Computation, module: HloModule
) -> int | None:
    """Returns the trips of a ``while``: as the compiler states them, else from its
    condition, where that is ``counter < constant`` for a counter of constant start and
    step, as scans have it; None where neither tells."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    names = loop.called_computations("condition", "body")
    condition, body = (module.computations[name] for name in names)
    compare = _find_origin(_Place(condition, condition.root), module)
    if compare.instruction.opcode != "compare":
        return None
    counter, end = (_find_origin(place, module) for place in compare.operands())
    stop = _read_integer(end.instruction)
    if stop is None or compare.instruction.attribute("direction") != "LT":
        return None
    if counter.instruction.opcode != "get-tuple-element":
        return None
    index = counter.instruction.integers("index")[0]
    start = _find_element(_Place(caller, loop.operands[0]), index, module)
    if start is None:
        return None
    first = _read_integer(start.instruction)
    step = _read_step(body, index, module)
    if first is None or step is None or step < 1:
        return None
    return max(-((first - stop) // step), 0)  # rounded up


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
        return [
            _Place(self.computation, name, self.outer)
            for name in self.instruction.operands
        ]


def _find_origin(place: _Place, module: HloModule) -> _Place:
    """Finds where a value comes from: past moves, into fusions and out of their
    parameters."""
    while True:
        instruction = place.instruction
        if instruction.opcode in _MOVE_OPCODES:
            place = place.operands()[0]
        elif instruction.opcode == "fusion":
            body = module.computations[instruction.called_computations("calls")[0]]
            place = _Place(body, body.root, place)
        elif instruction.opcode == "parameter" and place.outer is not None:
            place = place.outer.operands()[int(instruction.literal)]
        elif instruction.opcode == "get-tuple-element":
            index = instruction.integers("index")[0]
            element = _find_element(place.operands()[0], index, module)
            if element is None:
                return place
            place = element
        else:
            return place


def _find_element(whole: _Place, index: int, module: HloModule) -> _Place | None:
    """Finds where an element of a tuple comes from; None: the tuple is made
    elsewhere."""
    origin = _find_origin(whole, module)
    if origin.instruction.opcode != "tuple":
        return None
    return _find_origin(origin.operands()[index], module)


def _read_step(body: Computation, index: int, module: HloModule) -> int | None:
    """Returns the constant that a trip adds to an element of the loop's tuple."""
    after = _find_element(_Place(body, body.root), index, module)
    if after is None or after.instruction.opcode != "add":
        return None
    sides = [_find_origin(place, module).instruction for place in after.operands()]
    for one, other in (sides, sides[::-1]):
        if one.opcode == "get-tuple-element" and one.integers("index") == (index,):
            return _read_integer(other)
    return None


def _read_integer(instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    return None
