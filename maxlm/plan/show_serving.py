"""A plan of serving as tables for a terminal."""

from rich.console import Group
from rich.text import Text

from maxlm.plan.serving_plan import ServingPlan
from maxlm.plan.show import format_bytes, format_seconds, make_table


def render_serving_tables(
    plan: ServingPlan, *, price_per_device_hour: float | None = None
) -> Group:
    """Renders a plan, with the price of an accelerator's hour in whatever currency."""
    options, point, rate = plan.options, plan.point, plan.point.tokens_per_second
    each, whole = map(format_bytes, (plan.token_cache_bytes, plan.sequence_cache_bytes))
    lines = [
        f" · {_describe_split(plan)} · cache {plan.cache} · weights {options.weights} · requests"
        f" of {options.prompt:,} + {options.new:,} tokens\n"
        f"{plan.machine['name']}: {plan.machine['words']}\n",
        f"cache: {each} a token, {whole} a sequence of {options.length:,}",
        f"first token of a prompt alone after {format_seconds(plan.ttft_seconds)}; "
        f"{point.batch:,} sequences: {format_seconds(point.tpot_seconds)} a token, "
        f"{rate:,.0f} tokens/s, {rate / plan.devices:,.0f} a device",
    ]
    if price_per_device_hour is not None:
        price = price_per_device_hour * plan.devices / 3600 / rate
        lines.append(f"{1e6 * price:,.3g} for a million new tokens")
    verdict = (format_serving_verdict(plan), "bold")
    head = Text.assemble((plan.name, "bold"), lines[0], verdict)
    memory = [(name, f"{size:,.0f}", format_bytes(size)) for name, size in plan.memory.items()]
    step = [
        (name, format_seconds(seconds), f"{seconds / point.time['total']:.1%}")
        for name, seconds in point.time.items()
    ]
    curve = [
        (
            f"{own.batch:,}{' ←' if own == point else ''}",
            *map(format_seconds, (own.time["total"], own.tpot_seconds)),
            f"{own.tokens_per_second:,.0f}",
            f"{own.tokens_per_second / plan.devices:,.0f}",
        )
        for own in plan.curve
    ]
    title, sizes, times = f"A step of {point.batch:,} sequences", ("bytes", ""), ("time", "share")
    rates = ("step", "a token", "tokens/s", "a device")
    return Group(
        head,
        Text("\n".join(lines[1:])),
        make_table("Memory of each device", ("what", *sizes), memory, sizes),
        make_table(title, ("what", *times), step, times),
        make_table("By sequences at once", ("sequences", *rates), curve, rates),
    )


def format_serving_verdict(plan: ServingPlan) -> str:
    """Formats whether it fits and is in time, and what to do where not."""
    total, limit = (format_bytes(plan.memory[name]) for name in ("total", "limit"))
    need = f"{total} of {limit} a device"
    if not plan.fits:
        what = f"{plan.point.batch:,} sequences need {need}, {plan.max_batch:,} fit"
        if not plan.max_batch:
            what = f"not one sequence a replica: {need}"
        return (
            f"does not fit: {what}; split over more devices (tensor in --mesh), or choose a "
            "smaller --cache, --weights, --batch or --prompt"
        )
    words, missed = f"fits: {need}, {plan.max_batch:,} sequences at most", []
    for name, most, value in (
        ("first token", plan.options.ttft_ms, plan.ttft_seconds),
        ("token", plan.options.tpot_ms, plan.point.tpot_seconds),
    ):
        if most is not None and 1e3 * value > most:
            missed.append(f"{format_seconds(value)} a {name}, not {format_seconds(most / 1e3)}")
    return f"{words}, but too slow: {' and '.join(missed)}" if missed else words


def render_serving_search(plans: list[ServingPlan], top: int) -> Group:
    """Renders the best of a search."""
    good = [plan for plan in plans if plan.is_good]
    rows = [
        (
            _describe_split(plan),
            plan.cache,
            f"{plan.point.batch:,}",
            f"{plan.point.tokens_per_second / plan.devices:,.0f}",
            *map(format_seconds, (plan.point.tpot_seconds, plan.ttft_seconds)),
            format_bytes(plan.memory["total"]),
        )
        for plan in good[:top]
    ]
    columns = ("sequences", "tokens/s\na device", "a token", "first\ntoken", "memory")
    title = f"{len(plans)} splits and caches, {sum(plan.fits for plan in plans)} fit, "
    title += f"{len(good)} are in time too"
    return make_table(title, ("mesh", "cache", *columns), rows, columns)


def _describe_split(plan: ServingPlan) -> str:
    return " ".join(f"{axis}={plan.mesh[axis]}" for axis in ("data", "tensor"))
