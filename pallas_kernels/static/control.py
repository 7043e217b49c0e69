"""How often each bundle of a kernel runs: its control flow, executed.

A kernel's loops and branches hang on its scalar unit alone: grid indices, trip counts, and what
was prefetched to scalar memory (tables of blocks, group sizes). :func:`run_counts` executes those
instructions of the final schedule, so that counts are those of the program that the compiler made,
whatever it unrolled, pipelined or turned into predicates; vector instructions only pass by.

Assumed, and refused where it does not hold: no branch hangs on what a vector unit computed, or on
scalars whose values were not given.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pallas_kernels.static.schedule import Schedule

MAX_RUNS = 1 << 26
"""Of a loop's body, before it counts as endless."""

# Words of scalar memory below the region that a kernel's own allocations start at.
_SCOPED = 1 << 24
# Distance of operands' addresses: in HBM counted in granules of 32 bytes, in VMEM in rows of 16
# granules.
_OPERAND = 1 << 26
_OPERAND_IN_VMEM = _OPERAND // 16
# Where the runtime puts the core's index: a word of scalar memory.
_CORE_INDEX = 1
_M = 0xFFFFFFFF

_INSTRUCTION = re.compile(r"(?:%([\w.]+) = )?([a-z]\w*(?:\.\w+)*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%(?:\w+_)?([sp]\d+)\b")
_TARGET = re.compile(r"target bundleno = (\d+)")
_PREDICATE = re.compile(r"\((!?)%(?:\w+_)?(p\d+)\)")
_SELECT = re.compile(r"\((!?)%(?:\w+_)?(p\d+), ([^)]*)\)")
_SYMBOL = re.compile(r"\[#(allocation\w+)\]")

_BINARY = {
    "sadd": "{0} + {1} & M",
    "ssub": "{0} - {1} & M",
    "smul": "{0} * {1} & M",
    "sand": "{0} & {1}",
    "sor": "{0} | {1}",
    "sxor": "{0} ^ {1}",
    "sshll": "{0} << ({1} & 31) & M",
    "sshrl": "{0} >> ({1} & 31)",
    "sshra": "signed({0}) >> ({1} & 31) & M",
    "scalar_lea": "{0} + {1} & M",
    "por": "{0} | {1}",
    "pand": "{0} & {1}",
    "pxor": "{0} ^ {1}",
    "pnand": "{0} & {1} ^ 1",
    "pnor": "({0} | {1}) ^ 1",
}
_UNARY = {"smov", "int_to_ptr", "pmov", "pneg"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Unknown:
    """A value that the scalar unit alone does not determine; so is all that is made of it."""

    def _same(self, *_: Any) -> "Unknown":
        return self

    __add__ = __sub__ = __mul__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _same
    __radd__ = __rsub__ = __rmul__ = __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = (
        _same
    )
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __eq__(self, _: object) -> Any:
        return self

    def __ne__(self, _: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


UNKNOWN = Unknown()


@dataclass(frozen=True)
class _Block:
    start: int
    stop: int
    target: int | None
    """Of the branch that ends it."""


def run_counts(
    schedule: Schedule, core: int = 0, operands: Mapping[int, np.ndarray] | None = None
) -> np.ndarray:
    """Times each bundle runs, int64 [bundles].

    Args:
        core: of those that share a device, which one.
        operands: inputs that the kernel copies to scalar memory, by index: their bytes, in the
            order of their layout there, as uint32 words.

    Raises:
        ValueError: a branch that hangs on values not given, an unknown branch, an endless loop.
    """
    blocks = _blocks(schedule)
    source = _program(schedule, blocks)
    memory: dict[int, Any] = {_CORE_INDEX: core}
    names: dict[str, Any] = {
        "M": _M,
        "UNKNOWN": UNKNOWN,
        "Unknown": Unknown,
        "signed": lambda x: x if isinstance(x, Unknown) else x - ((x & 0x80000000) << 1),
        "copy": _copier(memory, operands or {}),
        "scalar": lambda i: int(operands[i][0]) if operands and i in operands else UNKNOWN,
        "load": lambda a: UNKNOWN if isinstance(a, Unknown) else memory.get(a, UNKNOWN),
        "store": _storer(memory),
    }
    exec(compile(source, schedule.name, "exec"), names)
    runs, stuck = names["run"]()
    if stuck is not None:
        raise ValueError(
            f"{schedule.name}: the branch after bundle {blocks[stuck].stop} hangs on a value that "
            "its scalar unit does not compute, or on an operand whose values were not given"
        )
    counts = np.zeros(len(schedule.bundles), np.int64)
    for block, times in zip(blocks, runs, strict=True):
        counts[block.start : block.stop] += times
    return counts


def knows_core(schedule: Schedule) -> bool:
    """Whether it looks up which core runs it; one that does not is not split over cores."""
    index = [tag for tag, at in schedule.scalar_memory.items() if at == (_CORE_INDEX, True)]
    return any(f"sld [smem:[#{tag}]]" in text for tag in index for text in schedule.bundles)


def _instructions(bundle: str) -> list[tuple[str | None, str, str]]:
    """(result, operation, operands) of each instruction in a bundle's text."""
    found = []
    for text in bundle.split(";;"):
        if match := _INSTRUCTION.match(text.strip()):
            found.append(match.groups())
    return found


def _blocks(schedule: Schedule) -> list[_Block]:
    """Bundles cut where a branch leads or, its delay past, leaves."""
    branches: dict[int, int] = {}
    for at, bundle in enumerate(schedule.bundles):
        for _, operation, rest in _instructions(bundle):
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
            raise ValueError(f"{schedule.name}: two branches overlap before bundle {cut}")
    return [_Block(a, b, branches.get(b)) for a, b in pairwise(cuts) if a < end]


def _program(schedule: Schedule, blocks: list[_Block]) -> str:
    """Python that does what the scalar unit does.

    Executed rather than interpreted: a grid of 32,768 steps has tens of millions of instructions.
    """
    index = {block.start: i for i, block in enumerate(blocks)}
    registers, body = set(), []
    for i, block in enumerate(blocks):
        lines = [f"n[{i}] += 1"]
        for at in range(block.start, block.stop):
            lines += _bundle_lines(schedule, at, registers)
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
            message = f"{schedule.name}: the loop that ends at bundle {block.stop} has no end"
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


def _bundle_lines(schedule: Schedule, at: int, registers: set[str]) -> list[str]:
    """One bundle: every instruction reads before any writes."""
    assigned, values, effects = [], [], []
    for result, operation, rest in _instructions(schedule.bundles[at]):
        registers.update(_REGISTER.findall(rest))
        register = _REGISTER.fullmatch(f"%{result}") if result else None
        if operation == "sbr.rel":
            predicate = _PREDICATE.search(rest)
            assigned.append("branch")
            values.append(_predicate(predicate) if predicate else "1")
        elif operation == "sst":
            effects.append(_store(schedule, rest))
        elif operation.startswith("dma.") and operation.endswith("_to_smem"):
            effects.append(_dma(schedule, rest))
        elif register and not _names_only(operation, rest, register[1]):
            registers.add(register[1])
            assigned.append(register[1])
            values.append(_value(schedule, operation, rest, register[1]))
    lines = [f"{', '.join(assigned)} = {', '.join(values)}"] if assigned else []
    return [line for line in effects if line] + lines


def _names_only(operation: str, rest: str, register: str) -> bool:
    """Whether it gives a register's value another name, perhaps one made in the same bundle."""
    if operation.startswith("int_to_ptr"):
        return _REGISTER.findall(rest)[-1:] == [register]
    return operation == "sphi"


def _predicate(match: re.Match) -> str:
    return f"{match[2]} ^ 1" if match[1] else match[2]


def _atom(schedule: Schedule, text: str) -> str:
    """A register, a number, or the address of an allocation."""
    text = text.strip().lstrip("$")
    if match := _REGISTER.fullmatch(text):
        return match[1]
    if re.fullmatch(r"-?\d+|-?0x[0-9a-f]+", text):
        return str(int(text, 0) & _M)
    if text in ("true", "false"):
        return str(int(text == "true"))
    if match := _SYMBOL.fullmatch(text):
        return str(_address(schedule, match[1]))
    return "UNKNOWN"


def _address(schedule: Schedule, allocation: str) -> int:
    """In words of scalar memory; 0 for memories that do not matter here."""
    offset, absolute = schedule.scalar_memory.get(allocation, (0, True))
    return offset if absolute else offset + _SCOPED


def _smem(schedule: Schedule, text: str) -> str:
    """``smem:[a + b]`` as an expression."""
    inside = re.search(r"smem:\[(.*?)\]\]?", text)
    if inside is None:
        return "UNKNOWN"
    terms = [
        _atom(schedule, f"[{term}]" if term.startswith("#") else term)
        for term in (part.strip() for part in inside[1].split("+"))
    ]
    return " + ".join(terms)


def _value(schedule: Schedule, operation: str, rest: str, register: str) -> str:
    """What an instruction assigns to ``register``, as an expression."""
    name = operation.partition(".")[0]
    predicate = None
    otherwise = register
    if match := _SELECT.search(rest):  # smov (predicate, otherwise), value
        otherwise = _atom(schedule, match[3])
        predicate = _predicate(match)
        rest = rest.replace(match[0], "", 1).lstrip(" ,")
    elif match := _PREDICATE.search(rest):
        predicate = _predicate(match)
        rest = rest.replace(match[0], "", 1).strip(" ,")
    value = _plain(schedule, operation, name, rest)
    return value if predicate is None else _select(predicate, value, otherwise)


def _select(predicate: str, value: str, otherwise: str) -> str:
    known = f"{value} if {predicate} else {otherwise}"
    return f"(UNKNOWN if isinstance({predicate}, Unknown) else {known})"


def _plain(schedule: Schedule, operation: str, name: str, rest: str) -> str:
    if name == "sld":
        return f"load({_smem(schedule, rest)})"
    if name == "inlined_call_operand":
        index = re.search(r"index: (\d+), kind: input", rest)
        if "<no memory space>" in rest:
            return f"scalar({index[1]})" if index else "UNKNOWN"
        distance = _OPERAND_IN_VMEM if operation.endswith(".vmem") else _OPERAND
        return str((int(index[1]) + 1) * distance) if index else "0"
    parts = [part for part in _split(rest) if not part.startswith("[resolvable")]
    if name == "int_to_ptr":
        parts = [parts[0].split()[-1]] if parts else re.findall(r"%\w+", rest)[-1:]
    atoms = [_atom(schedule, part) for part in parts]
    if name == "scmp" and len(atoms) == 2:
        _, how, kind, *_ = operation.split(".")
        if kind not in ("s32", "u32") or how not in _COMPARE:
            return "UNKNOWN"
        a, b = (f"signed({x})" for x in atoms) if kind == "s32" else atoms
        return f"({a} {_COMPARE[how]} {b})"
    if name == "scalar_select" and len(atoms) == 3:
        return _select(*atoms)
    if name in _UNARY and len(atoms) == 1:
        return f"{atoms[0]} ^ 1" if name == "pneg" else atoms[0]
    integer = not operation.endswith((".f32", ".bf16"))
    if name in _BINARY and len(atoms) == 2 and integer:
        return f"({_BINARY[name].format(*atoms)})"
    return "UNKNOWN"


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _store(schedule: Schedule, rest: str) -> str:
    match = re.match(r"\[(smem:\[.*?\]\]?) *(.*)", rest)
    if match is None:
        return ""
    address, rest = _smem(schedule, match[1]), match[2]
    predicate = _PREDICATE.search(rest)
    value = _atom(schedule, rest.split(",")[-1].strip().split()[-1])
    return f"store({_predicate(predicate) if predicate else 1}, {address}, {value})"


def _storer(memory: dict[int, Any]) -> Callable[..., None]:
    def store(predicate: Any, address: Any, value: Any) -> None:
        if isinstance(address, Unknown):
            memory.clear()  # It may have been any.
        elif isinstance(predicate, Unknown):
            memory[address] = UNKNOWN
        elif predicate:
            memory[address] = value

    return store


def _dma(schedule: Schedule, rest: str) -> str:
    predicate = _PREDICATE.search(rest)
    if predicate:
        rest = rest.replace(predicate[0], "", 1)
    parts = _split(re.sub(r"\[thread:.*?\]", "", rest))
    atoms = ", ".join(_atom(schedule, part) for part in parts[:3])
    return f"copy({_predicate(predicate) if predicate else 1}, {atoms})"


def _copier(memory: dict[int, Any], operands: Mapping[int, np.ndarray]) -> Callable[..., None]:
    def copy(predicate: Any, source: Any, granules: Any, target: Any) -> None:
        """From an operand's address to words of scalar memory, 32 bytes a granule."""
        if isinstance(target, Unknown) or isinstance(granules, Unknown):
            memory.clear()
        elif isinstance(predicate, Unknown) or predicate:
            data, start = (), 0
            if not (isinstance(predicate, Unknown) or isinstance(source, Unknown)):
                data = operands.get(source // _OPERAND - 1, ())
                start = source % _OPERAND * 8
            for i in range(granules * 8):
                inside = start + i < len(data)
                memory[target + i] = int(data[start + i]) if inside else UNKNOWN

    return copy
