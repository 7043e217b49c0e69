"""Bytes that instructions of a compiled program read from and write to main memory.

An instruction reads its operands and writes its result, once each, whatever a cache might save.
What is only named costs nothing: tuples, bitcasts, loops. What is changed in place or read in part
counts for the part: a scan's stacked arrays are not read whole in every trip. This holds inside a
fusion too, of which nothing but its parameters and roots touches memory.
"""

from collections.abc import Iterator

from maxlm.plan.compiled.hlo import Computation, HloModule, HloShape, Instruction

_FREE = (
    # Names for what is already there, and what runs other computations.
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain"),
    *("while", "conditional", "call", "async-start"),
    *("after-all", "add-dependency", "optimization-barrier", "partition-id", "replica-id"),
)
_PART = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape")


def memory_traffic_bytes(
    instruction: Instruction,
    computation: Computation,
    module: HloModule,
    on_chip_spaces: frozenset[int],
) -> int:
    """Returns bytes between main memory and the chip, for one run of a scheduled instruction;
    ``on_chip_spaces`` are memory spaces that are not main memory."""
    opcode = instruction.opcode
    free = opcode in _FREE or opcode.endswith(("-done", "-update"))
    if free or instruction.custom_call_target == "AllocateBuffer":
        return 0
    operands = [_off_chip(o.shapes, on_chip_spaces) for o in computation.operands(instruction)]
    result = _off_chip(instruction.shapes, on_chip_spaces)
    if opcode == "fusion":
        body = module.computations[instruction.called_computations("calls")[0]]
        if body.contains_custom_call("AsyncCollectiveDone"):
            return 0
        reads = sum(
            min(size, _read(body, parameter.name, size, module))
            for parameter, size in zip(body.parameters, operands, strict=False)
        )
        sizes = (_off_chip((shape,), on_chip_spaces) for shape in instruction.shapes)
        parts = _written(body, len(instruction.shapes))
        writes = sum(
            size if part is None else min(size, part)
            for size, part in zip(sizes, parts, strict=True)
        )
        return reads + writes
    if opcode in _PART:
        return min(operands[0], result) + sum(operands[1:]) + result
    if opcode in ("dynamic-update-slice", "scatter"):
        part = sum(operands[1:])
        return part + min(operands[-1] if opcode == "scatter" else operands[1], result)
    if opcode.endswith("-start"):
        # The result names the operand again, beside the array it fills.
        return sum(operands) + max(result - sum(operands), 0)
    return sum(operands) + result


def _off_chip(shapes: tuple[HloShape, ...], on_chip: frozenset[int]) -> int:
    return sum(shape.nbytes for shape in shapes if shape.memory_space not in on_chip)


def _read(body: Computation, name: str, size: int, module: HloModule) -> int:
    """Bytes of a fusion's parameter that its inside looks at."""
    total = 0
    for user in body.users.get(name, ()):
        if user.opcode in _SAME:
            total += _read(body, user.name, size, module)
        elif user.opcode in _PART and user.operands[0] == name:
            total += user.nbytes
        elif _passes_on(user, name, body):
            continue
        elif user.opcode == "fusion":
            inner = module.computations[user.called_computations("calls")[0]]
            for parameter, operand in zip(inner.parameters, user.operands, strict=False):
                total += _read(inner, parameter.name, size, module) if operand == name else 0
        else:
            return size
    return total


def _passes_on(user: Instruction, name: str, body: Computation) -> bool:
    """Whether an instruction in a fusion only passes a parameter on: changed in place, to the
    result, or to a collective under way, whose memory is counted where it starts."""
    if user.opcode == "dynamic-update-slice":
        return user.operands[0] == name
    if user.opcode == "tuple":
        return user.name == body.root
    return body.continues_async_collective(user)


def _written(body: Computation, count: int) -> Iterator[int | None]:
    """Yields the bytes written of each array of a fusion's result; None: all."""
    root = body.instructions[body.root]
    roots = list(body.operands(root)) if root.opcode == "tuple" else [root]
    if len(roots) != count:
        yield from [None] * count
        return
    for found in roots:
        while found.opcode in _SAME:
            found = body.instructions[found.operands[0]]
        if found.opcode == "dynamic-update-slice":
            yield body.instructions[found.operands[1]].nbytes
        elif found.opcode == "parameter" or body.continues_async_collective(found):
            yield 0
        else:
            yield None
