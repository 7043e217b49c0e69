"""Two plans of runs side by side: what differs."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.text import Text

from maxlm.plan.show import format_bytes, format_seconds, make_table
from maxlm.runtime.json_types import JsonObject


class StoredParameter(BaseModel):
    """One parameter's layout, of a plan as ``RunPlan.to_json`` writes it."""

    model_config = ConfigDict(extra="ignore")

    path: str
    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]
    """Mesh axes that split each dimension."""
    bytes_per_device: int

    @property
    def layout(self) -> str:
        """The dimensions with the mesh axes that split them, and a device's bytes, in
        words."""
        dimensions: list[str] = []
        for size, mesh_axes in zip(self.shape, self.spec, strict=True):
            dimension = str(size)
            if mesh_axes:
                dimension += f"→{'+'.join(mesh_axes)}"
            dimensions.append(dimension)
        return f"{' × '.join(dimensions)}: {format_bytes(self.bytes_per_device)}"


class StoredCollective(BaseModel):
    """One collective of a plan as ``RunPlan.to_json`` writes it."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    axes: tuple[str, ...]
    sent_bytes: float


class StoredPhase(BaseModel):
    """One phase beside the training step, of a plan as ``RunPlan.to_json`` writes
    it."""

    model_config = ConfigDict(extra="ignore")

    name: str
    memory_total: float
    seconds_total: float


class StoredPlan(BaseModel):
    """The compared parts of a plan as ``RunPlan.to_json`` writes it."""

    model_config = ConfigDict(extra="ignore")

    devices: int
    mesh: dict[str, int]
    parameters: int
    active_parameters: int
    tokens_per_step: int
    tokens_total: int
    remat: str
    micro_batches: int
    fits: bool | None
    machine: JsonObject | None
    memory: JsonObject
    """Bytes of a device, by part."""
    time: dict[str, float | None] | None
    goodput: dict[str, float] | None
    collectives: tuple[StoredCollective, ...]
    rows: tuple[StoredParameter, ...]
    phases: tuple[StoredPhase, ...] = ()


Value = str | float | bool | None
PlanDiff = dict[str, dict[str, tuple[Value, Value]]]
"""Part of a plan → what differs in it → its first and its second value; None where one
has none."""


def compare_plans(first: StoredPlan, second: StoredPlan) -> PlanDiff:
    """Compares two plans; returns the differing facts, mesh axes, memory (bytes of a
    device), time (seconds), bytes that a device sends, and layouts of parameters."""
    first_parts = _list_parts(first)
    second_parts = _list_parts(second)
    return {
        part: _compare(values, second_parts[part])
        for part, values in first_parts.items()
    }


def _compare(
    first: Mapping[str, Value], second: Mapping[str, Value]
) -> dict[str, tuple[Value, Value]]:
    """Returns the pairs of values that differ, in the order of their keys."""
    differing: dict[str, tuple[Value, Value]] = {}
    for key in dict.fromkeys([*first, *second]):
        first_value = first.get(key)
        second_value = second.get(key)
        if first_value != second_value:
            differing[key] = (first_value, second_value)
    return differing


def _list_parts(plan: StoredPlan) -> dict[str, Mapping[str, Value]]:
    """Returns the values to compare, by the parts of :data:`_TITLES`."""
    machine = None if plan.machine is None else plan.machine.get("name")
    # Rounded: digits that nobody sees are no difference.
    goodput = None if plan.goodput is None else round(plan.goodput["best"], 4)
    facts: dict[str, Value] = {
        "machine": machine,
        "devices": plan.devices,
        "parameters": plan.parameters,
        "active parameters": plan.active_parameters,
        "tokens a step": plan.tokens_per_step,
        "tokens of the run": plan.tokens_total,
        "remat": plan.remat,
        "micro-batches": plan.micro_batches,
        "fits": plan.fits,
        "goodput": goodput,
    }
    sent_bytes: dict[str, float] = {}
    for collective in plan.collectives:
        key = f"{collective.kind} over {'+'.join(collective.axes)}"
        sent_bytes[key] = sent_bytes.get(key, 0.0) + collective.sent_bytes
    # Parts of the working set have other names in each phase: only their sum compares.
    memory = {
        part: size for part, size in plan.memory.items() if part != "working_sets"
    }
    memory |= {phase.name: phase.memory_total for phase in plan.phases}
    time: dict[str, Value] = dict(plan.time or {})
    if plan.time is not None:
        time |= {phase.name: phase.seconds_total for phase in plan.phases}
    return {
        "facts": facts,
        "mesh": plan.mesh,
        "memory": memory,
        "time": time,
        "communication": sent_bytes,
        "parameters": {row.path: row.layout for row in plan.rows},
    }


_TITLES = {
    "facts": "Run and machine",
    "mesh": "Mesh",
    "memory": "Memory of each device, at the peak of a step",
    "time": "Time of a step, and of the run",
    "communication": "Sent by each device, in a step",
    "parameters": "Layout of parameters, and bytes of each device",
}


def render_plan_diff(diff: PlanDiff, names: tuple[str, str]) -> Group:
    """Renders a comparison of two plans of these names."""
    tables = [_render_part(part, pairs) for part, pairs in diff.items() if pairs]
    if not tables:
        return Group(Text("no difference"))
    first, second = names
    return Group(Text(f"first: {first}\nsecond: {second}"), *tables)


def _render_part(part: str, pairs: Mapping[str, tuple[Value, Value]]) -> Group:
    columns = ("", "first", "second", "change")
    rows = []
    for key, (first, second) in pairs.items():
        row = [
            key.replace("_", " ") if part == "time" else key,
            _format_value(part, key, first),
            _format_value(part, key, second),
            _format_change(first, second),
        ]
        rows.append(row)
    right = columns[1:]
    if not any(row[-1] for row in rows):
        # Words alone: nothing to compare in per cent.
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
        right = ()
    return make_table(_TITLES[part], columns, rows, right=right, wrap=columns)


def _format_value(part: str, key: str, value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and part in ("memory", "communication"):
        return format_bytes(value)
    if isinstance(value, float) and part == "time":
        if key.startswith("mfu"):
            return f"{value:.1%}"
        if key.endswith("hours") or key == "tokens_per_second":
            return f"{value:,.0f}"
        return format_seconds(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _format_change(first: Value, second: Value) -> str:
    """Formats the relative change of numbers; of other values, and from 0, nothing."""
    if isinstance(first, bool) or isinstance(second, bool):
        return ""
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return ""
    if first <= 0 or second < 0:
        return ""
    relative_change = second / first - 1
    return f"{relative_change:+.1%}"
