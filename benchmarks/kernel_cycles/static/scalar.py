"""Instructions of a TPU's scalar unit, as Python that does the same.

Registers become variables: an unsigned 32-bit integer, a truth value, or
:data:`UNKNOWN`. Memory, DMA and division become calls of ``load``, ``store``, ``copy``,
``divide`` and ``pop``.
"""

import re
from typing import Any

from benchmarks.kernel_cycles.static.schedule import Schedule

# Words of scalar memory below the region that a kernel's own allocations start at.
_SCOPED = 1 << 24
# Distance of operands' addresses: in HBM counted in granules of 32 bytes, in VMEM in
# rows of 16 granules.
OPERAND = 1 << 26
OPERAND_IN_VMEM = OPERAND // 16
_M = 0xFFFFFFFF

_INSTRUCTION = re.compile(r"(?:%([\w.]+) = )?([a-z]\w*(?:\.\w+)*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%(?:\w+_)?([sp]\d+)\b")
_PREDICATE = re.compile(r"\((!?)%(?:\w+_)?(p\d+)\)")
_SELECT = re.compile(r"\((!?)%(?:\w+_)?(p\d+), ([^)]*)\)")
_SYMBOL = re.compile(r"\[#(allocation\w+)\]")

_BINARY = {
    "sadd": "{0} + {1} & M",
    "ssub": "{0} - {1} & M",
    "smul": "{0} * {1} & M",
    "smulhi": "{0} * {1} >> 32",
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
_EXTREME = {"smin": "<", "smax": ">"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Unknown:
    """A value that the scalar unit alone does not determine; so is all that is made of
    it."""

    def _same(self, *_: Any) -> "Unknown":
        return self

    __add__ = __sub__ = __mul__ = __and__ = __or__ = __xor__ = __lshift__ = (
        __rshift__
    ) = _same
    __radd__ = __rsub__ = __rmul__ = __rand__ = __ror__ = __rxor__ = __rlshift__ = (
        __rrshift__
    ) = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __eq__(self, _: object) -> Any:
        return self

    def __ne__(self, _: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


UNKNOWN = Unknown()


def signed(x: Any) -> Any:
    """A 32-bit word as a signed integer."""
    return x if isinstance(x, Unknown) else x - ((x & 0x80000000) << 1)


def instructions(bundle: str) -> list[tuple[str | None, str, str]]:
    """(result, operation, operands) of each instruction in a bundle's text."""
    parsed = []
    for text in bundle.split(";;"):
        if match := _INSTRUCTION.match(text.strip()):
            parsed.append(match.groups())
    return parsed


def bundle_lines(schedule: Schedule, at: int, registers: set[str]) -> list[str]:
    """One bundle: every instruction reads before any writes."""
    assigned, values, effects = [], [], []
    for result, operation, rest in instructions(schedule.bundles[at]):
        registers.update(_REGISTER.findall(rest))
        register = _REGISTER.fullmatch(f"%{result}") if result else None
        if operation == "sbr.rel":
            predicate = _PREDICATE.search(rest)
            assigned.append("branch")
            values.append(_predicate(predicate) if predicate else "1")
        elif operation == "sdivrem.u32":
            effects.append(_division(schedule, rest))
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
    """Whether it gives a register's value another name, perhaps one made in the same
    bundle."""
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
        distance = OPERAND_IN_VMEM if operation.endswith(".vmem") else OPERAND
        return str((int(index[1]) + 1) * distance) if index else "0"
    parts = [part for part in _split(rest) if not part.startswith("[resolvable")]
    if name == "int_to_ptr":
        parts = [parts[0].split()[-1]] if parts else re.findall(r"%\w+", rest)[-1:]
    atoms = [_atom(schedule, part) for part in parts]
    if name == "spop" and operation.endswith("drf"):
        return "pop()"
    if name == "scmp" and len(atoms) == 2:
        a, b = atoms
        _, comparison, kind, *_ = operation.split(".")
        return _compare(a, b, kind, _COMPARE.get(comparison))
    if name in _EXTREME and len(atoms) == 2:
        a, b = atoms
        return _select(_compare(a, b, operation[-3:], _EXTREME[name]), a, b)
    if name == "scalar_select" and len(atoms) == 3:
        predicate, a, b = atoms
        return _select(predicate, a, b)
    if name in _UNARY and len(atoms) == 1:
        return f"{atoms[0]} ^ 1" if name == "pneg" else atoms[0]
    integer = not operation.endswith((".f32", ".bf16"))
    if name in _BINARY and len(atoms) == 2 and integer:
        return f"({_BINARY[name].format(*atoms)})"
    return "UNKNOWN"


def _compare(a: str, b: str, kind: str, sign: str | None) -> str:
    if sign is None or kind not in ("s32", "u32"):
        return "UNKNOWN"
    return f"(signed({a}) {sign} signed({b}))" if kind == "s32" else f"({a} {sign} {b})"


def _division(schedule: Schedule, rest: str) -> str:
    predicate = _PREDICATE.search(rest)
    if predicate:
        rest = rest.replace(predicate[0], "", 1)
    *atoms, results = _split(rest)
    a, b = (_atom(schedule, atom) for atom in atoms)
    return f"divide({_predicate(predicate) if predicate else 1}, {a}, {b}, {results!r})"


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _store(schedule: Schedule, rest: str) -> str:
    match = re.match(r"\[(smem:\[.*?\]\]?) *(.*)", rest)
    if match is None:
        return ""
    address = _smem(schedule, match[1])
    rest = match[2]
    predicate = _PREDICATE.search(rest)
    value = _atom(schedule, rest.split(",")[-1].strip().split()[-1])
    return f"store({_predicate(predicate) if predicate else 1}, {address}, {value})"


def _dma(schedule: Schedule, rest: str) -> str:
    predicate = _PREDICATE.search(rest)
    if predicate:
        rest = rest.replace(predicate[0], "", 1)
    parts = _split(re.sub(r"\[thread:.*?\]", "", rest))
    atoms = ", ".join(_atom(schedule, part) for part in parts[:3])
    return f"copy({_predicate(predicate) if predicate else 1}, {atoms})"
