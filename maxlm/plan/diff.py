"""The difference of two plans."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from maxlm.plan.show import format_bytes, format_seconds, make_table

_FACTS = (
    *("devices", "parameters", "active_parameters", "tokens_per_step", "tokens_total"),
    *("remat", "micro_batches", "fits"),
)


def compare_plans(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compares two plans as ``RunPlan.to_json`` gives them: the differing facts, memory, time,
    communication and layouts of parameters as [first, second]; None where one has none."""
    one, other = _list_parts(first), _list_parts(second)
    return {
        part: {
            key: [a.get(key), other[part].get(key)]
            for key in dict.fromkeys([*a, *other[part]])
            if a.get(key) != other[part].get(key)
        }
        for part, a in one.items()
    }


def _list_parts(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    machine, good = plan.get("machine"), plan.get("goodput")
    facts = {"machine": machine and machine["name"]} | {k: plan.get(k) for k in _FACTS}
    sent: dict[str, float] = {}
    for c in plan.get("collectives") or ():
        key = f"{c['kind']} over {'+'.join(c['axes'])}"
        sent[key] = sent.get(key, 0.0) + c["sent_bytes"]
    return {
        "facts": facts | {"goodput": good and round(good["best"], 4)},
        "mesh": plan["mesh"],
        "memory": {k: v for k, v in plan["memory"].items() if k != "working_sets"},
        "time": plan.get("time") or {},
        "communication": sent,
        "parameters": {row["path"]: _layout(row) for row in plan["rows"]},
    }


def _layout(row: Mapping[str, Any]) -> str:
    places = zip(row["shape"], row["spec"], strict=True)
    sizes = " × ".join(f"{n}→{'+'.join(axes)}" if axes else str(n) for n, axes in places)
    return f"{sizes}, {format_bytes(row['bytes_per_device'])} a device"


def render_diff_tables(diff: Mapping[str, Any], names: tuple[str, str]) -> Group:
    """Renders a comparison for a terminal."""
    columns, tables = ("what", *names, ""), []
    for part, pairs in diff.items():
        rows = [
            (k, _word(part, k, a), _word(part, k, b), _change(a, b)) for k, (a, b) in pairs.items()
        ]
        if rows:
            tables.append(make_table(part, columns, rows, right=columns[1:], wrap=columns))
    return Group(*tables) if tables else Group(Text("no difference"))


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
