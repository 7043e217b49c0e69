"""The cost of a compiled program for each device, with every loop's trips counted:
XLA's own ``cost_analysis()`` counts a body once, so that a scanned model seems to have
one layer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from maxlm.plan.compiled.flops import matmul_flops
from maxlm.plan.compiled.groups import find_device_group
from maxlm.plan.compiled.hlo import Computation, HloModule, Instruction, parse_hlo
from maxlm.plan.compiled.loops import count_trips
from maxlm.plan.network import sent_bytes

COLLECTIVES = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_KINDS = {name + end: name for name in COLLECTIVES for end in ("", "-start")}
# Instructions that run other computations → the attributes that name these.
CALLS = {
    "call": ("to_apply",),
    "async-start": ("calls", "called_computation", "called_computations"),
    "custom-call": ("called_computations",),
}


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
        whole = self.payload_bytes * (
            self.group_size if self.kind == "all-gather" else 1
        )
        return round(self.count * float(sent_bytes(self.kind, self.group_size, whole)))


@dataclass(frozen=True)
class CompiledCost:
    """A device's share of one run of the program."""

    matmul_flops: int
    """FLOPs, 2·M·N·K, of every matrix product but attention's."""
    attention_flops: int
    """FLOPs of attention's matrix products; those within custom kernels are in
    neither."""
    collectives: tuple[CompiledCollective, ...]
    """Collectives, largest first."""
    unknown_loops: tuple[str, ...]
    """Loops whose trips cannot be read; their bodies are counted once. A training step
    has one: its update, which is left out where the numbers are bad."""

    def wire_bytes(self, *, kind: str | None = None, axes: str | None = None) -> int:
        """Bytes that a device sends, of one kind, along given axes, or all."""
        sizes = self.wire_by_kind_and_axes().items()
        return sum(n for (k, a), n in sizes if kind in (None, k) and axes in (None, a))

    def wire_by_kind_and_axes(self) -> dict[tuple[str, str], int]:
        """(kind, axes) → bytes that a device sends, largest first."""
        total: Counter[tuple[str, str]] = Counter()
        for collective in self.collectives:
            total[collective.kind, collective.axes] += collective.wire_bytes
        return dict(total.most_common())


def read_compiled_cost(hlo_text: str, sizes: Mapping[str, int]) -> CompiledCost:
    """Reads costs out of a compiled program's text (``compiled.as_text()``); ``sizes``:
    mesh axis → devices, outermost first, of the mesh that it was compiled for."""
    reader = _Reader(parse_hlo(hlo_text), sizes)
    total = reader.cost(reader.module.entry)
    loops = sorted(name for kind, name in total if kind == "loop")
    return CompiledCost(*_sum_flops(total), _list_collectives(total), tuple(loops))


_Tally = Counter[tuple[str, Any]]
"""Costs of one run of a computation: FLOPs of ("matmul", "") and ("attention", ""),
runs of ("collective", :class:`CompiledCollective`) and of ("loop", name), whose trips
are unknown."""


def _sum_flops(tally: _Tally) -> tuple[int, int]:
    return tally["matmul", ""], tally["attention", ""]


def _list_collectives(tally: _Tally) -> tuple[CompiledCollective, ...]:
    collectives = [
        replace(collective, count=runs)
        for (kind, collective), runs in tally.items()
        if kind == "collective"
    ]
    return tuple(sorted(collectives, key=lambda collective: -collective.wire_bytes))


def _weigh(tally: _Tally) -> tuple[int, int]:
    """Returns the key that ranks a branch by cost: FLOPs, then the wire."""
    return sum(_sum_flops(tally)), sum(c.wire_bytes for c in _list_collectives(tally))


@dataclass
class _Reader:
    """Walks the call graph; every computation is read once."""

    module: HloModule
    sizes: Mapping[str, int]
    known: dict[str, _Tally] = field(default_factory=dict)

    def cost(self, computation: Computation) -> _Tally:
        """Returns the tally of one run, everything that it calls included."""
        if computation.name not in self.known:
            total = self.known[computation.name] = Counter()
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
                total["loop", instruction.op_name or instruction.name] = 1
            for body in self._called(instruction, "body"):
                total.update({key: trips * n for key, n in self.cost(body).items()})
        elif opcode == "conditional":
            attributes = "branch_computations", "true_computation", "false_computation"
            branches = [
                self.cost(branch) for branch in self._called(instruction, *attributes)
            ]
            total.update(max(branches, key=_weigh))
        elif opcode == "fusion":
            self._add_fusion(total, *self._called(instruction, "calls"))
        else:
            self._add_alone(total, instruction, computation)
            for called in self._called(instruction, *CALLS.get(opcode, ())):
                total.update(self.cost(called))

    def _add_fusion(self, total: _Tally, body: Computation) -> None:
        """An all-reduce of which the same fusion keeps a slice is how XLA:TPU writes a
        reduce-scatter."""
        sliced = any(i.opcode == "dynamic-slice" for i in body.instructions.values())
        for instruction in body.instructions.values():
            if instruction.opcode == "fusion":
                self._add_fusion(total, *self._called(instruction, "calls"))
            else:
                self._add_alone(total, instruction, body, sliced)

    def _add_alone(
        self,
        total: _Tally,
        instruction: Instruction,
        within: Computation,
        scattered: bool = False,
    ) -> None:
        if instruction.opcode in _KINDS:
            collective = self._collective(instruction, within, scattered)
            if collective.group_size > 1 and not within.continues_async_collective(
                instruction
            ):
                total["collective", collective] += 1
        elif flops := matmul_flops(instruction, within):
            is_attention = _is_attention(self.module.source_files(instruction))
            total["attention" if is_attention else "matmul", ""] += flops

    def _collective(
        self, instruction: Instruction, within: Computation, scattered: bool
    ) -> CompiledCollective:
        kind = _KINDS[instruction.opcode]
        operands = [s for o in within.operands(instruction) for s in o.shapes]
        if kind in ("ragged-all-to-all", "collective-permute") and len(operands) > 2:
            # Behind the data: the buffer it is written into, and offsets.
            operands = operands[:1]
        axes, size = find_device_group(instruction, self.sizes)
        return CompiledCollective(
            kind="reduce-scatter" if kind == "all-reduce" and scattered else kind,
            axes=axes,
            group_size=size,
            shape=str(max(operands, key=lambda s: s.nbytes)),
            op_name=instruction.op_name,
            payload_bytes=sum(s.nbytes for s in operands),
        )


def _is_attention(files: tuple[str, ...]) -> bool:
    """Attention's products are those traced through a file of kernels or of programs on
    shards that is about attention; a layer's projections are not."""
    return any(
        folder in ("pallas_kernels", "parallel") and "attention" in name
        for path in files
        for folder, name in pairwise(path.split("/")[-3:])
    )
