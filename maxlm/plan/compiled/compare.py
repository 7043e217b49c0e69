"""The plan's products and collectives beside those of the compiled step."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from maxlm.plan.compiled.cost import CompiledCost
from maxlm.plan.predict import CollectiveCost, RunPlan
from maxlm.plan.timing import count_device_flops, count_recurrence_products
from maxlm.plan.workload import StepShape


@dataclass(frozen=True)
class StepProducts:
    """FLOPs of a device's matrix products in a step."""

    matmul_flops: float
    """All but attention's and recurrences'."""
    attention_flops: float
    recurrence_flops: float
    """Within recurrences."""

    @property
    def total_flops(self) -> float:
        """Without recurrences'."""
        return self.matmul_flops + self.attention_flops


@dataclass(frozen=True)
class PlannedAndCompiled:
    """A figure of a step on a device, by the plan and by the compiler."""

    plan: float | None
    """None: not planned on its own."""
    compiler: float


@dataclass(frozen=True)
class CollectiveComparison:
    """All collectives of one kind over the same mesh axes in a step; bytes are a
    device's."""

    kind: str
    axes: str
    """Mesh axes, joined by "+"."""
    planned_runs: int
    compiled_runs: int
    """Runs in the compiled program, the trips of loops around it counted."""
    planned_bytes: float
    compiled_bytes: float


@dataclass(frozen=True)
class CompilerVerdict:
    """The compiler's account of a run's step on a machine, beside its plan."""

    fits: bool
    words: str
    """The verdict in words."""
    seconds: float | None = None
    """Seconds to trace and to compile it; None: the compiler finds no room, and says no
    more."""
    figures: Mapping[str, PlannedAndCompiled] = field(default_factory=dict)
    """Part of a device's memory → bytes."""
    products: Mapping[str, PlannedAndCompiled] = field(default_factory=dict)
    """Matrix products of a step → FLOPs of a device."""
    collectives: tuple[CollectiveComparison, ...] = ()
    """Collectives of a step, those that send most first."""
    unknown_loops: tuple[str, ...] = ()
    """Compiled loops whose trips cannot be read: what is in them is counted once."""


def count_step_products(shape: StepShape) -> StepProducts:
    """Counts a step's planned products on a device, a pipeline's idle turns included.

    Products of a dropless mixture's experts are in kernels that a compiler does not see
    into.
    """
    flops = count_device_flops(shape)
    passes = shape.stage_passes_with_bubble
    layers = passes * (flops.forward + flops.backward)
    matmul = layers + flops.loss + flops.loss_backward
    attention = passes * (flops.attention_forward + flops.attention_backward)
    recurrence = passes * sum(count_recurrence_products(shape))
    return StepProducts(float(matmul), float(attention), float(recurrence))


def compare_products(
    plan: RunPlan, cost: CompiledCost
) -> dict[str, PlannedAndCompiled]:
    """Compares a step's planned products with the compiled ones, in FLOPs of a
    device."""
    planned = count_step_products(plan.shape)
    recurrences = {}
    if planned.recurrence_flops or cost.recurrence_flops:
        recurrences["recurrences', outside of kernels"] = PlannedAndCompiled(
            planned.recurrence_flops, float(cost.recurrence_flops)
        )
    is_cpu = plan.machine is not None and plan.machine.topology.platform == "cpu"
    if is_cpu and not cost.attention_flops:
        # XLA:CPU rewrites attention's products, and forgets where they were traced.
        all_products = PlannedAndCompiled(planned.total_flops, float(cost.matmul_flops))
        return {"matrix products, attention's among them": all_products} | recurrences
    matmul = PlannedAndCompiled(planned.matmul_flops, float(cost.matmul_flops))
    attention = PlannedAndCompiled(planned.attention_flops, float(cost.attention_flops))
    return {
        "matrix products but attention's": matmul,
        "attention's, outside of kernels": attention,
    } | recurrences


def compare_collectives(
    planned: Iterable[CollectiveCost], cost: CompiledCost
) -> tuple[CollectiveComparison, ...]:
    """Compares the planned collectives of a step with the compiled ones, by kind and
    mesh axes, those that send most first.

    Rows of a ragged exchange are counted by the compiler at the room that they have.
    Compilers also join several collectives into one, so that runs differ where bytes
    agree.
    """
    planned_runs: Counter[tuple[str, str]] = Counter()
    planned_bytes: dict[tuple[str, str], float] = defaultdict(float)
    for collective in planned:
        key = collective.kind, "+".join(collective.axes)
        planned_runs[key] += collective.count
        planned_bytes[key] += collective.sent_bytes
    compiled_runs: Counter[tuple[str, str]] = Counter()
    compiled_bytes: Counter[tuple[str, str]] = Counter()
    for collective in cost.collectives:
        key = collective.kind, collective.axes
        compiled_runs[key] += collective.count
        compiled_bytes[key] += collective.wire_bytes
    comparisons = [
        CollectiveComparison(
            kind=key[0],
            axes=key[1],
            planned_runs=planned_runs[key],
            compiled_runs=compiled_runs[key],
            planned_bytes=planned_bytes[key],
            compiled_bytes=float(compiled_bytes[key]),
        )
        for key in sorted(planned_bytes.keys() | compiled_bytes.keys())
    ]
    comparisons.sort(key=lambda row: -max(row.planned_bytes, row.compiled_bytes))
    return tuple(comparisons)
