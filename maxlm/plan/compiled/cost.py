"""The cost of a compiled program for each device, with every loop's trips counted.

XLA's own ``cost_analysis()`` counts a body once, so that a scanned model seems to have
one layer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from maxlm.plan.compiled.flops import matmul_flops
from maxlm.plan.compiled.groups import find_device_group
from maxlm.plan.compiled.hlo import Computation, HloModule, Instruction, parse_hlo
from maxlm.plan.compiled.loops import count_trips
from maxlm.plan.network import count_sent_bytes

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Opcode → kind: an asynchronous collective has two instructions, of which one counts.
_KIND_OF_OPCODE = {name: name for name in COLLECTIVES}
_KIND_OF_OPCODE |= {f"{name}-start": name for name in COLLECTIVES}
# Instructions that run other computations → the attributes that name these.
CALLS = {
    "call": ("to_apply",),
    "async-start": ("calls", "called_computation", "called_computations"),
    "custom-call": ("called_computations",),
}

# Parts of names of files, or folders of kernels, whose products are counted apart.
_ATTENTION_FILES = ("attention",)
_RECURRENCE_FILES = ("linear_recurrence", "selective_scan", "causal_conv")


@dataclass(frozen=True)
class CompiledCollective:
    """All runs of one collective in a step; bytes are a device's."""

    kind: str
    axes: str
    """Mesh axes, joined by "+"."""
    group_size: int
    shape: str
    """The collective's largest array, as one device holds it."""
    op_name: str
    payload_bytes: int
    """Bytes of one run's operands on one device."""
    count: int = 1

    @property
    def wire_bytes(self) -> int:
        """Bytes that a ring sends from each device in all runs."""
        whole = self.payload_bytes
        if self.kind == "all-gather":
            # Its operand is a device's part.
            whole = whole * self.group_size
        one_run = float(count_sent_bytes(self.kind, self.group_size, whole))
        return round(self.count * one_run)


@dataclass(frozen=True)
class CompiledCost:
    """A device's share of one run of the program."""

    matmul_flops: int
    """FLOPs, 2·M·N·K, of every matrix product but attention's and recurrences'."""
    attention_flops: int
    """FLOPs of attention's matrix products; those within custom kernels are
    nowhere."""
    recurrence_flops: int
    """FLOPs of matrix products of recurrences and convolutions along sequences."""
    collectives: tuple[CompiledCollective, ...]
    """Collectives, largest first."""
    unknown_loops: tuple[str, ...]
    """Loops whose trips cannot be read; their bodies are counted once. A training step
    has one: its update, which is left out where the numbers are bad."""

    def wire_bytes(self, *, kind: str | None = None, axes: str | None = None) -> int:
        """Returns the bytes that a device sends: in collectives of one kind, or all
        (None), and over given axes, or any."""
        return sum(
            collective.wire_bytes
            for collective in self.collectives
            if kind in (None, collective.kind) and axes in (None, collective.axes)
        )

    def wire_by_kind_and_axes(self) -> dict[tuple[str, str], int]:
        """Returns (kind, axes) → bytes that a device sends, largest first."""
        total: Counter[tuple[str, str]] = Counter()
        for collective in self.collectives:
            total[collective.kind, collective.axes] += collective.wire_bytes
        return dict(total.most_common())


def read_compiled_cost(hlo_text: str, sizes: Mapping[str, int]) -> CompiledCost:
    """Reads costs out of a compiled program's text (``compiled.as_text()``).

    Args:
        sizes: mesh axis → devices, outermost first, of the mesh that it was compiled
            for.
    """
    reader = _Reader(parse_hlo(hlo_text), sizes)
    total = reader.cost(reader.module.entry)
    return CompiledCost(
        matmul_flops=total.matmul_flops,
        attention_flops=total.attention_flops,
        recurrence_flops=total.recurrence_flops,
        collectives=total.list_collectives(),
        unknown_loops=tuple(sorted(total.unknown_loops)),
    )


@dataclass
class _Tally:
    """Costs of one run of a computation."""

    matmul_flops: int = 0
    attention_flops: int = 0
    recurrence_flops: int = 0
    runs: Counter[CompiledCollective] = field(default_factory=Counter)
    """Runs of each collective."""
    unknown_loops: set[str] = field(default_factory=set)
    """Names of loops whose trips are unknown."""

    def add(self, other: "_Tally", times: int = 1) -> None:
        """Adds so many runs of another computation."""
        self.matmul_flops += times * other.matmul_flops
        self.attention_flops += times * other.attention_flops
        self.recurrence_flops += times * other.recurrence_flops
        for collective, runs in other.runs.items():
            self.runs[collective] += times * runs
        self.unknown_loops |= other.unknown_loops

    def list_collectives(self) -> tuple[CompiledCollective, ...]:
        collectives = [
            replace(collective, count=runs) for collective, runs in self.runs.items()
        ]
        return tuple(sorted(collectives, key=lambda collective: -collective.wire_bytes))

    @property
    def weight(self) -> tuple[int, int]:
        """Key that ranks branches by cost: FLOPs, then bytes on the wire."""
        sent = sum(collective.wire_bytes for collective in self.list_collectives())
        products = self.matmul_flops + self.attention_flops + self.recurrence_flops
        return products, sent


@dataclass
class _Reader:
    """Walks the call graph; every computation is read once."""

    module: HloModule
    sizes: Mapping[str, int]
    known: dict[str, _Tally] = field(default_factory=dict)

    def cost(self, computation: Computation) -> _Tally:
        """Returns the tally of one run, everything that it calls included."""
        if computation.name not in self.known:
            total = _Tally()
            self.known[computation.name] = total
            for instruction in computation.instructions.values():
                self._add(total, instruction, computation)
        return self.known[computation.name]

    def _called(self, instruction: Instruction, *attributes: str) -> list[Computation]:
        names = instruction.called_computations(*attributes)
        return [self.module.computations[name] for name in names]

    def _add(
        self, total: _Tally, instruction: Instruction, computation: Computation
    ) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = count_trips(instruction, computation, self.module)
            if trips is None:
                trips = 1
                total.unknown_loops.add(instruction.op_name or instruction.name)
            for body in self._called(instruction, "body"):
                total.add(self.cost(body), times=trips)
        elif opcode == "conditional":
            attributes = (
                "branch_computations",
                "true_computation",
                "false_computation",
            )
            branches = self._called(instruction, *attributes)
            tallies = [self.cost(branch) for branch in branches]
            total.add(max(tallies, key=lambda tally: tally.weight))
        elif opcode == "fusion":
            self._add_fusion(total, *self._called(instruction, "calls"))
        else:
            self._add_alone(total, instruction, computation)
            for called in self._called(instruction, *CALLS.get(opcode, ())):
                total.add(self.cost(called))

    def _add_fusion(self, total: _Tally, body: Computation) -> None:
        """Adds what is in a fusion. An all-reduce of which the same fusion keeps a
        slice is how XLA:TPU writes a reduce-scatter."""
        instructions = body.instructions.values()
        keeps_slice = any(other.opcode == "dynamic-slice" for other in instructions)
        for instruction in instructions:
            if instruction.opcode == "fusion":
                self._add_fusion(total, *self._called(instruction, "calls"))
            else:
                self._add_alone(total, instruction, body, keeps_slice)

    def _add_alone(
        self,
        total: _Tally,
        instruction: Instruction,
        computation: Computation,
        scatters: bool = False,
    ) -> None:
        """Adds an instruction without what it calls.

        Args:
            scatters: whether an all-reduce is a reduce-scatter.
        """
        if instruction.opcode in _KIND_OF_OPCODE:
            collective = self._read_collective(instruction, computation, scatters)
            is_continued = computation.continues_async_collective(instruction)
            if collective.group_size > 1 and not is_continued:
                total.runs[collective] += 1
            return
        flops = matmul_flops(instruction, computation)
        if not flops:
            return
        files = self.module.source_files(instruction)
        if _is_traced_through(files, _ATTENTION_FILES):
            total.attention_flops += flops
        elif _is_traced_through(files, _RECURRENCE_FILES):
            total.recurrence_flops += flops
        else:
            total.matmul_flops += flops

    def _read_collective(
        self, instruction: Instruction, computation: Computation, scatters: bool
    ) -> CompiledCollective:
        kind = _KIND_OF_OPCODE[instruction.opcode]
        arrays = [
            shape
            for operand in computation.operands(instruction)
            for shape in operand.shapes
        ]
        if kind in ("ragged-all-to-all", "collective-permute") and len(arrays) > 2:
            # Behind the data: the buffer it is written into, and offsets.
            arrays = arrays[:1]
        axes, group_size = find_device_group(instruction, self.sizes)
        if kind == "all-reduce" and scatters:
            kind = "reduce-scatter"
        return CompiledCollective(
            kind=kind,
            axes=axes,
            group_size=group_size,
            shape=str(max(arrays, key=lambda array: array.nbytes)),
            op_name=instruction.op_name,
            payload_bytes=sum(array.nbytes for array in arrays),
        )


def _is_traced_through(files: tuple[str, ...], subjects: tuple[str, ...]) -> bool:
    """Returns whether products traced through these files are of a subject: a file of
    kernels or of programs on shards, or a folder of kernels, that has its name is among
    them. A layer's projections are not."""
    for path in files:
        for folder, name in pairwise(path.split("/")[-3:]):
            is_program = folder in ("pallas_kernels", "parallel")
            if is_program and any(subject in name for subject in subjects):
                return True
    return False
