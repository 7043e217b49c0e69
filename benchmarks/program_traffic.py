"""Bytes that a compiled program reads from and writes to main memory, and its custom
kernels, with every loop's trips counted.

An instruction reads its operands and writes its result, once each, whatever a cache
might save. What is only named costs nothing: tuples, bitcasts, loops. What is changed
in place or read in part counts for the part: a scan's stacked arrays are not read whole
in every trip. This holds inside a fusion too, of which nothing but its parameters and
roots touches memory.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from maxlm.plan.compiled.cost import CALLS
from maxlm.plan.compiled.flops import matmul_flops
from maxlm.plan.compiled.hlo import (
    Computation,
    HloModule,
    HloShape,
    Instruction,
    parse_hlo,
)
from maxlm.plan.compiled.loops import count_trips

_FREE = (
    # Names for what is already there, and what runs other computations.
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain"),
    *("while", "conditional", "call", "async-start"),
    *(
        "after-all",
        "add-dependency",
        "optimization-barrier",
        "partition-id",
        "replica-id",
    ),
)
_PART = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape")
# Bookkeeping of the compiler, not kernels.
_NO_KERNELS = (
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
)


@dataclass(frozen=True)
class CustomCall:
    """All runs of a kernel whose inside the compiler does not see."""

    target: str
    op_name: str
    flops: int | None
    """FLOPs of all runs, as declared by its author; None: not declared."""
    count: int = 1


@dataclass
class ProgramTraffic:
    """What one run of a program moves and calls on a device."""

    memory_bytes: int = 0
    """Bytes between main memory and the chip."""
    calls: Counter[CustomCall] = field(default_factory=Counter)

    @property
    def custom_calls(self) -> list[CustomCall]:
        """Kernels, with most FLOPs first."""
        counted_calls = (
            replace(call, count=n, flops=None if call.flops is None else n * call.flops)
            for call, n in self.calls.items()
        )
        return sorted(counted_calls, key=lambda call: -(call.flops or 0))

    def add(self, other: "ProgramTraffic", times: int = 1) -> None:
        self.memory_bytes += times * other.memory_bytes
        self.calls.update({call: times * count for call, count in other.calls.items()})


def read_program_traffic(
    hlo_text: str, on_chip_spaces: Iterable[int] = (1,)
) -> ProgramTraffic:
    """Reads traffic out of a compiled program's text (``compiled.as_text()``);
    ``on_chip_spaces`` are memory spaces that are not main memory (1 on a TPU: its
    VMEM)."""
    module = parse_hlo(hlo_text)
    return _read_traffic(module.entry, module, frozenset(on_chip_spaces), {})


def _read_traffic(
    computation: Computation,
    module: HloModule,
    on_chip: frozenset[int],
    known: dict[str, ProgramTraffic],
) -> ProgramTraffic:
    if computation.name in known:
        return known[computation.name]
    total = known[computation.name] = ProgramTraffic()

    def called(instruction: Instruction, *attributes: str) -> list[ProgramTraffic]:
        names = instruction.called_computations(*attributes)
        return [
            _read_traffic(module.computations[n], module, on_chip, known) for n in names
        ]

    for item in computation.instructions.values():
        total.memory_bytes += memory_traffic_bytes(item, computation, module, on_chip)
        if item.opcode == "while":
            (body,) = called(item, "body")
            total.add(body, count_trips(item, computation, module) or 1)
        elif item.opcode == "conditional":
            names = "branch_computations", "true_computation", "false_computation"
            total.add(max(called(item, *names), key=lambda branch: branch.memory_bytes))
        elif item.opcode == "fusion":
            (body,) = called(item, "calls")
            total.calls.update(body.calls)
        elif item.opcode == "custom-call" and _is_kernel(item, computation):
            total.calls[
                CustomCall(item.custom_call_target, item.op_name, declared_flops(item))
            ] += 1
        for body in called(item, *CALLS.get(item.opcode, ())):
            total.add(body)
    return total


def declared_flops(instruction: Instruction) -> int | None:
    """Returns the FLOPs that a custom kernel declares (``pl.CostEstimate``); None:
    none."""
    match = re.search(
        r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', instruction.attributes
    )
    return int(match[1]) if match else None


def _is_kernel(call: Instruction, computation: Computation) -> bool:
    known = call.custom_call_target in _NO_KERNELS or matmul_flops(call, computation)
    return not known


def _list_users(body: Computation, name: str) -> Iterator[Instruction]:
    return (i for i in body.instructions.values() if name in i.operands)


def _nbytes(instruction: Instruction) -> int:
    return sum(shape.nbytes for shape in instruction.shapes)


def memory_traffic_bytes(
    instruction: Instruction,
    computation: Computation,
    module: HloModule,
    on_chip_spaces: frozenset[int],
) -> int:
    """Returns bytes between main memory and the chip, for one run of a scheduled
    instruction; ``on_chip_spaces`` are memory spaces that are not main memory."""
    opcode = instruction.opcode
    free = opcode in _FREE or opcode.endswith(("-done", "-update"))
    if free or instruction.custom_call_target == "AllocateBuffer":
        return 0
    operands = [
        _off_chip(o.shapes, on_chip_spaces) for o in computation.operands(instruction)
    ]
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
    for user in _list_users(body, name):
        if user.opcode in _SAME:
            total += _read(body, user.name, size, module)
        elif user.opcode in _PART and user.operands[0] == name:
            total += _nbytes(user)
        elif _passes_on(user, name, body):
            continue
        elif user.opcode == "fusion":
            inner = module.computations[user.called_computations("calls")[0]]
            for parameter, operand in zip(
                inner.parameters, user.operands, strict=False
            ):
                total += (
                    _read(inner, parameter.name, size, module) if operand == name else 0
                )
        else:
            return size
    return total


def _passes_on(user: Instruction, name: str, body: Computation) -> bool:
    """Whether an instruction in a fusion only passes a parameter on: changed in place,
    to the result, or to a collective under way, whose memory is counted where it
    starts."""
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
    for instruction in roots:
        while instruction.opcode in _SAME:
            instruction = body.instructions[instruction.operands[0]]
        if instruction.opcode == "dynamic-update-slice":
            yield _nbytes(body.instructions[instruction.operands[1]])
        elif instruction.opcode == "parameter" or body.continues_async_collective(
            instruction
        ):
            yield 0
        else:
            yield None
