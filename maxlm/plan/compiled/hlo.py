"""A compiled program's text (scheduled HLO, ``compiled.as_text()``) as a graph of
instructions.

Only what costs are read from: shapes, operands, called computations, loop trip counts
and where an instruction comes from. The text differs a little between backends and
versions; what is read here is common to all. Attributes are kept as text and searched
when asked for.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}",
    re.MULTILINE | re.DOTALL,
)
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_BRACKET = re.compile(r"[()]")
# A kernel's metadata and cost estimate stand on lines of their own within the
# instruction.
_CONTINUED = re.compile(r'\n(?="|\}\}|\}, ")')
_SPACE = re.compile(r"S\((\d+)\)")
# Rows of the tables behind a module: ids, and what they refer to.
_FILE_NAME = re.compile(r'^(\d+) "(.*)"$', re.MULTILINE)
_FILE_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+)", re.MULTILINE)
_STACK_FRAME = re.compile(
    r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", re.MULTILINE
)
# The memory space in which XLA:TPU keeps semaphores.
SEMAPHORES = 2


@dataclass(frozen=True)
class HloShape:
    """One array, as it lies on one device."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0
    """Memory space of its layout; 0 is the device's main memory."""

    @property
    def size(self) -> int:
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        # f8e4m3fn: the first number in the name; pred is a byte, tokens are nothing.
        width = re.search(r"\d+", self.dtype)
        if width:
            bits = int(width[0])
        elif self.dtype == "pred":
            bits = 8
        else:
            bits = 0
        return (self.size * bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[HloShape, ...]
    """The arrays of the result, a tuple's flattened."""
    operands: tuple[str, ...]
    literal: str
    """Text between the parentheses: a constant's value, a parameter's number."""
    attributes: str

    @cached_property
    def op_name(self) -> str:
        match = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @cached_property
    def custom_call_target(self) -> str:
        return (self.attribute("custom_call_target") or "").strip('"')

    def attribute(self, name: str) -> str | None:
        """Returns the text of ``name=...``: a word, or what stands within its
        braces."""
        match = re.search(
            rf"(?:^|[ ,]){name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.attributes
        )
        if match is None:
            return None
        return match[1] if match[1] is not None else match[2]

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns an attribute that lists numbers, ``dimensions={0,1}``; absent:
        none."""
        text = self.attribute(name) or ""
        return tuple(int(digits) for digits in re.findall(r"\d+", text))

    def called_computations(self, *names: str) -> tuple[str, ...]:
        """Returns the computations under attributes of these names."""
        computations: list[str] = []
        for name in names:
            computations += _NAME.findall(self.attribute(name) or "")
        return tuple(computations)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]
    """Instructions by name, in the order they run."""
    root: str

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        return (self.instructions[name] for name in instruction.operands)

    def contains_custom_call(self, target: str) -> bool:
        return any(
            instruction.custom_call_target == target
            for instruction in self.instructions.values()
        )

    def continues_async_collective(self, instruction: Instruction) -> bool:
        """Whether an instruction of a fusion's body is a collective that another fusion
        has started: XLA:TPU spreads one under several computations, and prints it in
        each of them.

        These are handed its semaphores. Channels do not tell: many collectives share
        one.
        """
        has_channel = instruction.attribute("channel_id") is not None
        starts_here = self.contains_custom_call("AsyncCollectiveStart")
        return has_channel and self._takes_semaphores and not starts_here

    @cached_property
    def _takes_semaphores(self) -> bool:
        for parameter in self.parameters:
            if [shape.memory_space for shape in parameter.shapes] == [SEMAPHORES]:
                return True
        return False

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Parameters in the order of their numbers."""
        parameters = [
            instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        ]
        return tuple(sorted(parameters, key=lambda parameter: int(parameter.literal)))


@dataclass(frozen=True)
class HloModule:
    computations: Mapping[str, Computation]
    entry: Computation
    files: Mapping[int, tuple[str, ...]]
    """Stack frame id → the source files on that stack, innermost first."""

    def source_files(self, instruction: Instruction) -> tuple[str, ...]:
        """The source files an instruction was traced through, innermost first; may be
        empty."""
        frame = re.search(r"\bstack_frame_id=(\d+)", instruction.attributes)
        if frame:
            return self.files.get(int(frame[1]), ())
        file = re.search(r'\bsource_file="([^"]*)"', instruction.attributes)
        return (file[1],) if file else ()


def parse_hlo(text: str) -> HloModule:
    """Reads a module (of several joined, the first)."""
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    for is_entry, name, body in _COMPUTATION.findall(_CONTINUED.sub(" ", text)):
        instructions: dict[str, Instruction] = {}
        root = ""
        for is_root, instruction_name, rest in _INSTRUCTION.findall(body):
            instructions[instruction_name] = _parse_instruction(instruction_name, rest)
            if is_root:
                root = instruction_name
        computations[name] = Computation(name, instructions, root)
        if is_entry and entry is None:
            entry = computations[name]
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return HloModule(computations, entry, _parse_stack_frames(text))


def _parse_shapes(text: str) -> tuple[HloShape, ...]:
    """Returns the arrays in the text of a type, tuples flattened."""
    shapes = []
    for dtype, dims, layout in _LEAF.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(digits) for digits in re.findall(r"\d+", dims))
        memory_space = int(space[1]) if space else 0
        shapes.append(HloShape(dtype, sizes, memory_space))
    return tuple(shapes)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parses what follows ``%name =``: ``type opcode(operands), attributes``."""
    is_tuple = text.startswith("(")
    type_end = _find_closing_end(text, 0) if is_tuple else text.index(" ")
    opcode = _OPCODE.match(text, type_end)
    if opcode is None:
        raise ValueError(f"no opcode in: %{name} = {text[:200]}")
    operands_end = _find_closing_end(text, opcode.end() - 1)
    inner = text[opcode.end() : operands_end - 1]
    # A constant's value may look like names.
    operands = () if opcode[1] == "constant" else tuple(_NAME.findall(inner))
    return Instruction(
        name=name,
        opcode=opcode[1],
        shapes=_parse_shapes(text[:type_end]),
        operands=operands,
        literal=inner,
        attributes=text[operands_end:],
    )


def _find_closing_end(text: str, start: int) -> int:
    """Returns the place after the parenthesis that closes the one at ``start``."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def _parse_stack_frames(text: str) -> dict[int, tuple[str, ...]]:
    """Joins the tables FileNames, FileLocations and StackFrames; returns each frame's
    files, innermost first."""
    name_rows = _FILE_NAME.findall(_find_table(text, "FileNames"))
    name_of_file = dict(name_rows)
    location_rows = _FILE_LOCATION.findall(_find_table(text, "FileLocations"))
    file_of_location = dict(location_rows)
    frame_rows = _STACK_FRAME.findall(_find_table(text, "StackFrames"))
    # Parents come before their children; some versions print them one too high.
    shift = any(frame == parent for frame, _, parent in frame_rows)
    frames: dict[int, tuple[str, ...]] = {}
    for frame, location, parent in frame_rows:
        outer_files = frames.get(int(parent or 0) - shift, ())
        file = file_of_location.get(location, "")
        frames[int(frame)] = (name_of_file.get(file, ""), *outer_files)
    return frames


def _find_table(text: str, title: str) -> str:
    """Returns the lines under a title, up to an empty one."""
    table = re.search(rf"^{title}\n(.*?)(?:^\s*$|\Z)", text, re.MULTILINE | re.DOTALL)
    return table[1] if table else ""
