"""The difference of two plans."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from maxlm.plan.show import format_bytes, format_seconds

_FACTS = (
    "devices",
    "parameters",
    "active_parameters",
    "tokens_per_step",
    "tokens_total",
    "remat",
    "micro_batches",
    "fits",
)


def compare_plans(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compares two plans: facts, memory, time, communication, and the layout of parameters.

    Args:
        first, second: plans as ``Plan.to_json`` gives them.

    Returns:
        Each part's entries as [first, second]; None where one has none.
    """
    return {
        "facts": _pairs(_facts(first), _facts(second)),
        "mesh": _pairs(first["mesh"], second["mesh"]),
        "memory": _pairs(_memory(first), _memory(second)),
        "time": _pairs(first.get("time") or {}, second.get("time") or {}),
        "communication": _pairs(_sent(first), _sent(second)),
        "parameters": _pairs(_layouts(first), _layouts(second)),
    }


def _facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    machine, good = plan.get("machine"), plan.get("goodput")
    facts = {"machine": machine and machine["name"]} | {k: plan.get(k) for k in _FACTS}
    return facts | {"goodput": good and round(good["best"], 4)}


def _memory(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in plan["memory"].items() if k != "working_sets"}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = dict.fromkeys([*a, *b])
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}


def _sent(plan: Mapping[str, Any]) -> dict[str, float]:
    total: dict[str, float] = {}
    for c in plan.get("collectives") or ():
        key = f"{c['kind']} over {'+'.join(c['axes'])}"
        total[key] = total.get(key, 0.0) + c["sent_bytes"]
    return total


def _layouts(plan: Mapping[str, Any]) -> dict[str, str]:
    return {row["path"]: _layout(row) for row in plan["rows"]}


def _layout(row: Mapping[str, Any]) -> str:
    sizes = " × ".join(
        f"{n}→{'+'.join(axes)}" if axes else str(n)
        for n, axes in zip(row["shape"], row["spec"], strict=True)
    )
    return f"{sizes}, {format_bytes(row['bytes_per_device'])} a device"


def render_diff_tables(found: Mapping[str, Any], names: tuple[str, str]) -> Group:
    """Renders a comparison for a terminal."""
    if not any(found.values()):
        return Group(Text("no difference"))
    parts: list[Any] = []
    for part, entries in found.items():
        if not entries:
            continue
        table = Table(box=None, pad_edge=False)
        table.add_column("what", overflow="fold")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("", justify="right")
        for what, (a, b) in entries.items():
            table.add_row(what, _word(part, what, a), _word(part, what, b), _change(a, b))
        parts += [Text(f"\n{part}", style="italic"), table]
    return Group(*parts)


def _word(part: str, what: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if part in ("memory", "communication") and isinstance(value, float):
        return format_bytes(value)
    if part == "time" and isinstance(value, float):
        if what.startswith("mfu"):
            return f"{value:.1%}"
        if what.endswith("hours") or what == "tokens_per_second":
            return f"{value:,.0f}"
        return format_seconds(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _change(a: Any, b: Any) -> str:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return f"{b / a - 1:+.1%}" if numbers and a > 0 and b >= 0 else ""
