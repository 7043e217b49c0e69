"""Plans of serving as tables for a terminal."""

from rich.console import Group
from rich.text import Text

from maxlm.plan.machine import SAFE_FILL_RATIO
from maxlm.plan.serving import ServingPlan
from maxlm.plan.show import format_bytes, format_seconds, make_table


def render_serving_tables(
    plan: ServingPlan, *, price_per_device_hour: float | None = None
) -> Group:
    """Renders a plan, with the price of an accelerator's hour in whatever currency."""
    facts = (
        f" · {_describe_split(plan)} · cache {plan.cache} · "
        f"weights {plan.options.weights} · requests of "
        f"{plan.options.prompt:,} + {plan.options.new:,} tokens\n"
        f"{plan.machine['name']}: {plan.machine['words']}\n"
    )
    verdict = format_serving_verdict(plan)
    head = Text.assemble((plan.name, "bold"), facts, (verdict, "bold"))
    estimate = Text(_format_serving_estimate(plan, price_per_device_hour))
    return Group(
        head,
        estimate,
        _render_serving_memory(plan),
        _render_serving_step(plan),
        _render_serving_curve(plan),
    )


def _render_serving_memory(plan: ServingPlan) -> Group:
    rows = [
        (name, f"{size:,.0f}", format_bytes(size)) for name, size in plan.memory.items()
    ]
    sizes = ("bytes", "")
    return make_table("Memory of each device", ("what", *sizes), rows, right=sizes)


def _render_serving_step(plan: ServingPlan) -> Group:
    """Renders the time of a step by its parts."""
    total = plan.point.time["total"]
    rows = [
        (name, format_seconds(seconds), f"{seconds / total:.1%}")
        for name, seconds in plan.point.time.items()
    ]
    times = ("time", "share")
    title = f"A step of {_count_sequences(plan.point.batch)}"
    return make_table(title, ("what", *times), rows, right=times)


def _render_serving_curve(plan: ServingPlan) -> Group:
    """Renders rates by the number of sequences at once; an arrow marks the plan's."""
    rows = []
    for point in plan.curve:
        sequences = f"{point.batch:,}"
        if point == plan.point:
            sequences += " ←"
        cells = (
            sequences,
            format_seconds(point.time["total"]),
            format_seconds(point.tpot_seconds),
            f"{point.tokens_per_second:,.0f}",
            f"{point.tokens_per_second / plan.devices:,.0f}",
        )
        rows.append(cells)
    rates = ("step", "a token", "tokens/s", "a device")
    columns = ("sequences", *rates)
    return make_table("By sequences at once", columns, rows, right=rates)


def _format_serving_estimate(
    plan: ServingPlan, price_per_device_hour: float | None
) -> str:
    """Formats the cache's bytes, the times of tokens, and their price."""
    cache = (
        f"cache: {format_bytes(plan.token_cache_bytes)} a token, "
        f"{format_bytes(plan.sequence_cache_bytes)} a sequence of "
        f"{plan.options.length:,}"
    )
    point = plan.point
    rate = point.tokens_per_second
    times = (
        f"first token of a prompt alone after {format_seconds(plan.ttft_seconds)}; "
        f"{_count_sequences(point.batch)}: {format_seconds(point.tpot_seconds)} "
        f"a token, {rate:,.0f} tokens/s, {rate / plan.devices:,.0f} a device"
    )
    lines = [cache, times]
    if price_per_device_hour is not None:
        price_per_token = price_per_device_hour * plan.devices / 3600 / rate
        price_per_million = 1e6 * price_per_token
        lines.append(f"{price_per_million:,.3g} for a million new tokens")
    return "\n".join(lines)


def _count_sequences(count: int) -> str:
    """Formats ``1 sequence``, ``2 sequences``."""
    return f"{count:,} sequence" if count == 1 else f"{count:,} sequences"


def format_serving_verdict(plan: ServingPlan) -> str:
    """Formats whether it fits and is in time, and what to do where not."""
    total = format_bytes(plan.memory["total"])
    limit = format_bytes(plan.memory["limit"])
    need = f"{total} of {limit} a device"
    if not plan.fits:
        need += f", of which {SAFE_FILL_RATIO:.0%} are filled at most"
        sequences = _count_sequences(plan.point.batch)
        problem = f"{sequences} need {need}; {plan.max_batch:,} fit"
        if not plan.max_batch:
            problem = f"not one sequence a replica: {need}"
        return (
            f"does not fit: {problem}; split over more devices (tensor in --mesh), "
            "or choose a smaller --cache, --batch or --prompt"
        )
    verdict = f"fits: {need}, {_count_sequences(plan.max_batch)} at most"
    missed_targets = [
        *_list_missed_target("first token", plan.ttft_seconds, plan.options.ttft_ms),
        *_list_missed_target("token", plan.point.tpot_seconds, plan.options.tpot_ms),
    ]
    if missed_targets:
        return f"{verdict}, but too slow: {' and '.join(missed_targets)}"
    return verdict


def _list_missed_target(name: str, seconds: float, max_ms: float | None) -> list[str]:
    """Formats the time of a token where it is above its target, if there is one."""
    if max_ms is None or 1e3 * seconds <= max_ms:
        return []
    target = format_seconds(max_ms / 1e3)
    return [f"{format_seconds(seconds)} a {name}, not {target}"]


def render_serving_search(plans: list[ServingPlan], top: int) -> Group:
    """Renders the best of a search: ``top`` of the plans that fit and are in time."""
    feasible = [plan for plan in plans if plan.is_feasible]
    rows = []
    for plan in feasible[:top]:
        tokens_per_device = plan.point.tokens_per_second / plan.devices
        cells = (
            _describe_split(plan),
            plan.cache,
            f"{plan.point.batch:,}",
            f"{tokens_per_device:,.0f}",
            format_seconds(plan.point.tpot_seconds),
            format_seconds(plan.ttft_seconds),
            format_bytes(plan.memory["total"]),
        )
        rows.append(cells)
    figures = ("sequences", "tokens/s\na device", "a token", "first\ntoken", "memory")
    num_fitting = sum(plan.fits for plan in plans)
    title = f"{len(plans)} splits and caches, {num_fitting} fit, "
    title += f"{len(feasible)} are in time too"
    return make_table(title, ("mesh", "cache", *figures), rows, right=figures)


def _describe_split(plan: ServingPlan) -> str:
    return " ".join(f"{axis}={plan.mesh[axis]}" for axis in ("data", "tensor"))
