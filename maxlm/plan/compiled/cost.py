"""The cost of a compiled program for each device, with every loop's trips counted.

XLA's own ``cost_analysis()`` counts a loop's body once, so that a scanned model seems to have one
layer.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maxlm.plan.compiled.bytes import FREE, memory_traffic_bytes
from maxlm.plan.compiled.flops import declared_flops, matmul_flops
from maxlm.plan.compiled.groups import find_device_group
from maxlm.plan.compiled.hlo import Computation, HloModule, Instruction, parse_hlo
from maxlm.plan.compiled.loops import count_trips

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_KINDS = {name + end: name for name in COLLECTIVES for end in ("", "-start")}
# Bookkeeping of the compiler, not kernels.
_NO_KERNELS = (
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
)
_CALLS = {
    "call": ("to_apply",),
    "async-start": ("calls", "called_computation", "called_computations"),
    "custom-call": ("called_computations",),
}

IsAttention = Callable[[str, tuple[str, ...]], bool]
"""(op_name, source files) -> whether a matrix product is one of attention's own two."""


@dataclass(frozen=True)
class CompiledCollective:
    """All runs of one collective in a step; bytes are a device's."""

    kind: str
    axes: str
    """Mesh axes, joined by "+"."""
    group_size: int
    shape: str
    """The largest array of it, as one device holds it."""
    op_name: str
    count: int
    """Times it runs in a step."""
    payload_bytes: int
    """Of one run: the operands on one device."""
    wire_bytes: int
    """Of all runs: what a ring sends from each device."""


@dataclass(frozen=True)
class Matmul:
    """All runs of the matrix products that one operation became."""

    op_name: str
    attention: bool
    count: int
    flops: int
    """Of all runs."""


@dataclass(frozen=True)
class CustomCall:
    """All runs of a kernel whose inside the compiler does not see."""

    target: str
    op_name: str
    count: int
    flops: int | None
    """Of all runs, as declared by its author; None: not declared."""


@dataclass(frozen=True)
class CompiledArray:
    """A kind of array that the program makes in main memory, whole on one device."""

    shape: str
    nbytes: int
    op_name: str
    """Of one operation that makes it."""


@dataclass(frozen=True)
class CompiledCost:
    """A device's share of one run of the program."""

    matmul_flops: int
    """2·M·N·K of every matrix product but attention's, ..."""
    attention_flops: int
    """... and of attention's; those within custom kernels are in neither."""
    memory_bytes: int
    """Read from and written to main memory; see ``bytes.py``."""
    matmuls: tuple[Matmul, ...]
    collectives: tuple[CompiledCollective, ...]
    custom_calls: tuple[CustomCall, ...]
    """All three, largest first."""
    arrays: tuple[CompiledArray, ...]
    """The largest kinds of arrays made; how many of each are alive together is not told."""
    unknown_loops: tuple[str, ...]
    """Loops whose trips cannot be read; their bodies are counted once. A training step has one: its
    update, which is left out where the numbers are bad."""

    def wire_bytes(self, *, kind: str | None = None, axes: str | None = None) -> int:
        """Bytes that a device sends, of one kind, along given axes, or all."""
        return sum(
            c.wire_bytes
            for c in self.collectives
            if (kind is None or c.kind == kind) and (axes is None or c.axes == axes)
        )

    def wire_by_kind_and_axes(self) -> dict[tuple[str, str], int]:
        """(kind, axes) → bytes that a device sends, largest first."""
        total: Counter[tuple[str, str]] = Counter()
        for c in self.collectives:
            total[c.kind, c.axes] += c.wire_bytes
        return dict(total.most_common())


@dataclass(frozen=True)
class CompiledMemory:
    """A compiled program's main memory on each device, bytes."""

    argument: int
    output: int
    alias: int
    """Of the output, what takes an argument's place."""
    temp: int

    @property
    def peak(self) -> int:
        """Everything alive at once, as the compiler lays it out."""
        return self.argument + self.temp + self.output - self.alias


def read_compiled_memory(compiled: Any) -> CompiledMemory:
    """From ``compiled.memory_analysis()``."""
    stats = compiled.memory_analysis()
    return CompiledMemory(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        alias=stats.alias_size_in_bytes,
        temp=stats.temp_size_in_bytes,
    )


def is_attention_product(op_name: str, files: tuple[str, ...]) -> bool:
    """Attention's products are those traced through a file of kernels or of programs on shards
    that is about attention; a layer's projections are not."""
    del op_name
    parts = (path.replace("\\", "/").split("/")[-3:] for path in files)
    return any(
        folder in ("pallas_kernels", "parallel") and "attention" in name
        for path in parts
        for folder, name in itertools.pairwise(path)
    )


def read_compiled_cost(
    text: str,
    sizes: Mapping[str, int],
    *,
    on_chip: Iterable[int] = (),
    is_attention: IsAttention = is_attention_product,
) -> CompiledCost:
    """Read costs out of a compiled program's text.

    Args:
        text: ``compiled.as_text()``.
        sizes: mesh axis → devices, outermost first, of the mesh that it was compiled for.
        on_chip: memory spaces that are not main memory (1 on a TPU: its VMEM).
        is_attention: which matrix products are attention's.

    Raises:
        ValueError: text that is not an HLO module's.
    """
    reader = _Reader(parse_hlo(text), sizes, frozenset(on_chip), is_attention)
    total = reader.cost(reader.module.entry)
    matmuls: dict[tuple[str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for event, count in _events(total, _Product):
        found = matmuls[event.op_name, event.attention]
        found[0] += count
        found[1] += count * event.flops
    products = [Matmul(*key, *found) for key, found in matmuls.items()]
    collectives = [
        CompiledCollective(
            **vars(event), count=count, wire_bytes=round(count * ring_bytes(**_ring(event)))
        )
        for event, count in _events(total, _Exchange)
    ]
    custom = [
        CustomCall(e.target, e.op_name, count, None if e.flops is None else count * e.flops)
        for e, count in _events(total, _Kernel)
    ]
    return CompiledCost(
        matmul_flops=sum(m.flops for m in products if not m.attention),
        attention_flops=sum(m.flops for m in products if m.attention),
        memory_bytes=total.memory,
        matmuls=tuple(sorted(products, key=lambda m: -m.flops)),
        collectives=tuple(sorted(collectives, key=lambda c: -c.wire_bytes)),
        custom_calls=tuple(sorted(custom, key=lambda c: -(c.flops or 0))),
        arrays=_largest(reader.arrays),
        unknown_loops=tuple(sorted(e for e in total.events if isinstance(e, str))),
    )


def _largest(arrays: Mapping[str, CompiledArray], count: int = 20) -> tuple[CompiledArray, ...]:
    return tuple(sorted(arrays.values(), key=lambda a: -a.nbytes)[:count])


def ring_bytes(kind: str, group_size: int, payload_bytes: int) -> float:
    """Returns the bytes that each device sends in one run of a collective, on a ring.

    Args:
        payload_bytes: the operands on one device: the shard of an all-gather, the whole of a
            reduce-scatter, an all-reduce or an all-to-all.
    """
    n = group_size
    if n < 2:
        return 0.0
    share = {
        "all-gather": float(n - 1),
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
    }
    return share.get(kind, 1.0) * payload_bytes


@dataclass(frozen=True)
class _Product:
    op_name: str
    attention: bool
    flops: int


@dataclass(frozen=True)
class _Exchange:
    kind: str
    axes: str
    group_size: int
    shape: str
    op_name: str
    payload_bytes: int


@dataclass(frozen=True)
class _Kernel:
    target: str
    op_name: str
    flops: int | None


@dataclass
class _Tally:
    """Events and how often each happens; a loop of unknown trips is its name."""

    events: Counter[Any] = field(default_factory=Counter)
    memory: int = 0

    def add(self, other: "_Tally", times: int = 1) -> None:
        self.memory += times * other.memory
        for event, count in other.events.items():
            self.events[event] += times * count

    def weight(self) -> tuple[float, ...]:
        """To choose the costliest branch by: FLOPs, then the wire, then memory."""
        flops = sum(count * e.flops for e, count in _events(self, _Product))
        wire = sum(count * ring_bytes(**_ring(e)) for e, count in _events(self, _Exchange))
        return flops, wire, self.memory


def _events(tally: _Tally, kind: type) -> list[tuple[Any, int]]:
    return [(e, count) for e, count in tally.events.items() if isinstance(e, kind)]


def _ring(event: _Exchange) -> dict[str, Any]:
    return {n: getattr(event, n) for n in ("kind", "group_size", "payload_bytes")}


@dataclass
class _Reader:
    """Walks the call graph; every computation is read once."""

    module: HloModule
    sizes: Mapping[str, int]
    on_chip: frozenset[int]
    is_attention: IsAttention
    known: dict[str, _Tally] = field(default_factory=dict)
    arrays: dict[str, CompiledArray] = field(default_factory=dict)

    def cost(self, computation: Computation) -> _Tally:
        """Returns the tally of one run, everything that it calls included."""
        if computation.name not in self.known:
            total = _Tally()
            for instruction in computation.instructions.values():
                self._add(total, instruction, computation)
            self.known[computation.name] = total
        return self.known[computation.name]

    def _add(self, total: _Tally, instruction: Instruction, computation: Computation) -> None:
        total.memory += memory_traffic_bytes(instruction, computation, self.module, self.on_chip)
        if instruction.opcode not in FREE:
            self._note_arrays(instruction)
        opcode = instruction.opcode
        if opcode == "while":
            trips = count_trips(instruction, computation, self.module)
            if trips is None:
                total.events[instruction.op_name or instruction.name] += 1
            for called in instruction.calls("body"):
                total.add(
                    self.cost(self.module.computations[called]), 1 if trips is None else trips
                )
        elif opcode == "conditional":
            names = instruction.calls(
                "branch_computations", "true_computation", "false_computation"
            )
            branches = [self.cost(self.module.computations[name]) for name in names]
            total.add(max(branches, key=_Tally.weight))
        elif opcode == "fusion":
            self._add_fusion(total, self.module.computations[instruction.calls("calls")[0]])
        else:
            self._add_alone(total, instruction, computation)
            for called in instruction.calls(*_CALLS.get(opcode, ())):
                total.add(self.cost(self.module.computations[called]))

    def _note_arrays(self, instruction: Instruction) -> None:
        for shape in instruction.shapes:
            name = str(shape)
            named = name in self.arrays and self.arrays[name].op_name
            if shape.space not in self.on_chip and not named:
                self.arrays[name] = CompiledArray(name, shape.nbytes, instruction.op_name)

    def _add_fusion(self, total: _Tally, body: Computation) -> None:
        """Its memory is counted where it is called. An all-reduce of which the same fusion keeps
        a slice is how XLA:TPU writes a reduce-scatter."""
        sliced = any(i.opcode == "dynamic-slice" for i in body.instructions.values())
        for instruction in body.instructions.values():
            if instruction.opcode == "fusion":
                self._add_fusion(total, self.module.computations[instruction.calls("calls")[0]])
            else:
                self._add_alone(total, instruction, body, scattered=sliced)

    def _add_alone(
        self,
        total: _Tally,
        instruction: Instruction,
        computation: Computation,
        *,
        scattered: bool = False,
    ) -> None:
        opcode, op_name = instruction.opcode, instruction.op_name
        if opcode in _KINDS:
            exchange = self._exchange(instruction, computation, scattered)
            if exchange.group_size > 1 and not computation.goes_on(instruction):
                total.events[exchange] += 1
            return
        flops = matmul_flops(instruction, computation)
        if flops:
            attention = self.is_attention(op_name, self.module.source(instruction))
            total.events[_Product(op_name, attention, flops)] += 1
        elif opcode == "custom-call" and instruction.target not in _NO_KERNELS:
            kernel = _Kernel(instruction.target, op_name, declared_flops(instruction))
            total.events[kernel] += 1

    def _exchange(
        self, instruction: Instruction, computation: Computation, scattered: bool
    ) -> _Exchange:
        kind = _KINDS[instruction.opcode]
        operands = [s for o in computation.operands(instruction) for s in o.shapes]
        if kind in ("ragged-all-to-all", "collective-permute") and len(operands) > 2:
            # Behind the data: the buffer it is written into, and offsets.
            operands = operands[:1]
        group = find_device_group(instruction, self.sizes)
        return _Exchange(
            kind="reduce-scatter" if kind == "all-reduce" and scattered else kind,
            axes=group.axes,
            group_size=group.size,
            shape=str(max(operands, key=lambda s: s.nbytes)),
            op_name=instruction.op_name,
            payload_bytes=sum(s.nbytes for s in operands),
        )
