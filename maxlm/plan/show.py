"""Plans as tables for a terminal."""

from collections.abc import Container, Iterable, Sequence
from math import inf
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from maxlm.models.architectures.config import strip_stack_name
from maxlm.plan.known_errors import format_known_time_errors
from maxlm.plan.layout import ParamRow, RunLayout
from maxlm.plan.predict import FILL, RunPlan
from maxlm.plan.search import SearchResult
from maxlm.plan.serving import ServingPlan

# Hoffmann et al. 2022 (arXiv 2203.15556): about as many tokens a parameter are
# compute-optimal.
OPTIMAL = 20


def format_bytes(size: float) -> str:
    """Formats ``1.5 GiB``: three significant digits, binary units."""
    sign = "-" if size < 0 else ""
    size = abs(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.5:
            return f"{sign}{_three_digits(size)} {unit}"
        size /= 1024
    return f"{sign}{_three_digits(size)} TiB"


def format_count(count: float) -> str:
    """Formats ``6.74B``: thousands, millions, billions, trillions."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{_three_digits(count / limit)}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Formats ``1.5 ms``, ``12 s``, ``3.2 h``, ``14 days``."""
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if seconds < limit:
            return f"{_three_digits(seconds * scale)} {unit}"
    if seconds < 7200:
        return f"{_three_digits(seconds / 60)} min"
    hours = seconds / 3600
    return (
        f"{_three_digits(hours)} h"
        if hours < 72
        else f"{_three_digits(hours / 24)} days"
    )


def _three_digits(value: float) -> str:
    """Never in scientific notation."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def render_plan_tables(
    plan: RunPlan, *, price_per_device_hour: float | None = None
) -> Group:
    """Renders a plan, with the price of an accelerator's hour in whatever currency."""
    parts: list[Any] = [render_layout_facts(plan.layout)]
    if plan.machine:
        parts.append(Text(f"{plan.machine.name}: {plan.machine.topology.description}"))
        parts.append(Text(format_fit_verdict(plan), style="bold"))
        parts.append(Text(format_run_estimate(plan, price_per_device_hour)))
        if plan.known_time_errors:
            parts.append(
                Text(format_known_time_errors(plan.known_time_errors), style="bold")
            )
    parts += [_parameters(plan.layout), _memory(plan)]
    if size := plan.shape.work.cache_bytes:
        tokens = f"{plan.shape.work.tokens_per_row.decoder:,} tokens"
        parts.append(
            Text(f"caches of one row of {tokens} in generation: {format_bytes(size)}")
        )
    if plan.collectives:
        parts.append(_communication(plan))
    if plan.machine:
        parts.append(_time(plan))
    return Group(*parts)


def render_layout_facts(layout: RunLayout) -> Text:
    axes = " ".join(f"{axis}={size}" for axis, size in layout.mesh.items() if size > 1)
    sparse = layout.active_parameters < layout.parameters
    active = f", {layout.active_parameters:,} of them active" if sparse else ""
    per_parameter = layout.tokens_total / layout.parameters
    ratio = (
        format_count(per_parameter) if per_parameter >= 1000 else f"{per_parameter:.3g}"
    )
    return Text.assemble(
        (layout.name, "bold"),
        f" · {layout.parameters:,} parameters{active} · {layout.devices:,} devices"
        f" ({axes or 'one of each axis'})\n",
        f"{layout.tokens_per_step:,} tokens a step · "
        f"{format_count(layout.tokens_total)} in the run"
        f" ({ratio} a parameter, {per_parameter / OPTIMAL:.2g}× of {OPTIMAL}:1)\n",
        f"{layout.flops_per_token:.4g} FLOPs a token with causal attention at half,"
        f" {layout.flops_per_token_full_attention:.4g} in full",
        *(f"\n{note}" for note in layout.notes),
    )


def format_prediction(plan: RunPlan) -> str:
    """Formats the time of a step and the memory of a device in a line."""
    if plan.step_seconds is None:
        return _format_need(plan)
    return f"{format_seconds(plan.step_seconds)} a step, MFU {plan.mfu():.1%}, {_format_need(plan)}"


def _format_need(plan: RunPlan) -> str:
    limit = plan.memory_limit_bytes
    there = "" if limit is None else f" of {format_bytes(limit)}"
    return f"{format_bytes(float(plan.memory.total))}{there} a device"


def format_fit_verdict(plan: RunPlan) -> str:
    assert plan.memory_limit_bytes is not None
    total = float(plan.memory.total)
    need = _format_need(plan)
    if plan.barely_fits:
        return f"fits, but closer than the plan is sure of: {need}; ask --compile"
    if plan.fits:
        return f"fits: {need}, {1 - total / plan.memory_limit_bytes:.0%} to spare"
    return (
        f"does not fit: {need}; raise train.micro_batches, choose a model.remat that "
        f"keeps less, "
        "split over more devices, or let --search choose"
    )


def make_table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Container[str],
    wrap: Container[str] = (),
) -> Group:
    """Makes a table under a title, which may be wider; columns align right and wrap by
    name."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        justify = "right" if name in right else "left"
        table.add_column(
            name, justify=justify, no_wrap=name not in wrap, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return Group(*([Text(f"\n{title}", style="italic")] if title else []), table)


def _parameters(layout: RunLayout) -> Group:
    dtypes = ", ".join(sorted({row.dtype for row in layout.rows}))
    where, *sizes = (
        "layout: logical axis = size → mesh axes",
        "bytes",
        "a device",
        "copies",
    )
    rows = []
    for row in layout.rows:
        held = format_bytes(row.bytes_total), format_bytes(row.bytes_per_device)
        rows.append((row.path, _dimensions(row), *held, str(row.replicas)))
    columns = ("parameter", where, *sizes)
    return make_table(
        f"Parameters ({dtypes})", columns, rows, right=sizes, wrap=(where,)
    )


def _dimensions(row: ParamRow) -> str:
    """``layers=32 · embed=4096→fsdp · mlp=14336→tensor``"""
    parts = []
    for axis, size, mesh_axes in zip(row.axes, row.shape, row.spec, strict=True):
        name = f"{axis}={size}" if axis else str(size)
        parts.append(f"{name}→{'+'.join(mesh_axes)}" if mesh_axes else name)
    return " · ".join(parts)


def _memory(plan: RunPlan) -> Group:
    held = plan.memory
    parts = {
        "parameters (fp32)": held.parameters,
        "optimizer state": held.optimizer,
        "moving average (fp32)": held.average,
        "frozen models (fp32)": held.frozen,
        "batch": held.batch,
        "gradients": held.gradients,
        f"activations kept ({plan.shape.remat})": held.activations,
        f"working set of {held.peak_phase}": held.working,
        **{
            f"  {what}": size
            for what, size in held.working_sets[held.peak_phase].items()
        },
        "together": held.total,
    }
    if plan.memory_limit_bytes is not None:
        margin = plan.memory_limit_bytes - float(held.total)
        parts |= {"limit": plan.memory_limit_bytes, "margin": margin}
    sizes = ((name, float(size)) for name, size in parts.items())
    rows = [(name, f"{size:,.0f}", format_bytes(size)) for name, size in sizes if size]
    title = "Memory of each device, at the peak of a step"
    return make_table(title, ("what", "bytes", ""), rows, right=("bytes", ""))


def _communication(plan: RunPlan) -> Group:
    """Kernels together, and both passes."""
    names = (strip_stack_name(row.path) for row in plan.layout.rows)
    kernels = {name.partition(".kernel")[0] for name in names} | {"head"}
    total: dict[tuple[Any, ...], tuple[int, float, float]] = {}
    for s in plan.collectives:
        owner, _, rest = s.what.partition(": ")
        what = f"kernels{f': {rest}s' if rest else ''}" if owner in kernels else s.what
        over = f"{', '.join(s.axes)} ({s.link})" if s.link else ", ".join(s.axes)
        key = (what, s.kind, over, "waits" if s.waits else "can hide it")
        runs, sent, seconds = total.get(key, (0, 0.0, 0.0))
        total[key] = (runs + s.count, sent + s.sent_bytes, seconds + (s.seconds or 0.0))
    rows = []
    timed = ("time",) if plan.machine else ()
    for (*key, hidden), (runs, sent, seconds) in total.items():
        taken = (format_seconds(seconds),) * len(timed)
        rows.append((*key, f"{runs:,}", format_bytes(sent), *taken, hidden))
    columns = ("what", "kind", "over", "runs", "sent", *timed, "computation")
    title = "Communication of each device, in a step"
    right = ("runs", "sent", "time")
    return make_table(title, columns, rows, right=right, wrap=("what", "over"))


def _time(plan: RunPlan) -> Group:
    time = plan.time
    assert time is not None
    parts = {
        "matrix products": time.products,
        "attention": time.attention,
        "element-wise maps, optimizer": time.traffic,
        "communication that nothing hides": time.exposed,
        "pipeline idle": time.idle,
        "together": time.total,
    }
    total = float(time.total)
    seconds = ((name, float(value)) for name, value in parts.items())
    rows = [(name, format_seconds(s), f"{s / total:.1%}") for name, s in seconds if s]
    return make_table(
        "Time of a step", ("what", "time", "share"), rows, right=("time", "share")
    )


def format_run_estimate(
    plan: RunPlan, price_per_device_hour: float | None = None
) -> str:
    """Formats rates, the whole run, and the cost of failures."""
    layout, good, step, hours = (
        plan.layout,
        plan.goodput,
        plan.step_seconds,
        plan.run_hours,
    )
    assert step is not None
    assert good is not None
    rate = layout.tokens_per_step / step
    lines = [
        f"{format_seconds(step)} a step · {format_count(rate)} tokens/s, "
        f"{format_count(rate / layout.devices)} a device · "
        f"MFU {plan.mfu():.1%} (attention at half), "
        f"{plan.mfu(full_attention=True):.1%} (in full)"
    ]
    if hours is not None:
        steps = layout.tokens_total // layout.tokens_per_step
        words = f"{steps:,} steps in {format_seconds(3600 * hours)}, "
        words += f"{hours * layout.devices:,.0f} device-hours"
        if price_per_device_hour is not None:
            price = price_per_device_hour
            words += f", {price * hours * layout.devices:,.0f} at {price:g} each"
        lines.append(words)
    every = max(1, round(good.best_interval_seconds / step))
    best = good.best_interval_seconds
    own = "none are configured"
    if plan.checkpoint_every:
        own = (
            f"{good.configured:.1%} with every {plan.checkpoint_every:,} as configured"
        )
    lines.append(
        f"goodput {good.best:.1%} with a checkpoint every {every:,} steps "
        f"({format_seconds(best)}), {own}; a failure every "
        f"{format_seconds(3600 * good.mtbf_hours)}"
    )
    return "\n".join(lines)


def render_candidates_table(
    result: SearchResult,
    memory_limit_bytes: float,
    compiled_peak_bytes: Sequence[float] = (),
) -> Group:
    """Renders a search's best layouts.

    Args:
        compiled_peak_bytes: peaks of the first candidates by the compiler's account;
            infinite where it finds no room.
    """
    rows = []
    for place, candidate in enumerate(result.best):
        sizes = [f"{axis}={size}" for axis, size in candidate.sizes.items() if size > 1]
        row = [
            " ".join(sizes) or "one device",
            str(candidate.micro_batches),
            candidate.remat,
            ", ".join(candidate.residual) or "whole",
            format_seconds(candidate.seconds),
            format_bytes(candidate.memory),
            f"{candidate.memory / memory_limit_bytes:.0%}",
        ]
        if compiled_peak_bytes:
            is_compiled = place < len(compiled_peak_bytes)
            row.append(_format_peak(compiled_peak_bytes[place]) if is_compiled else "")
        rows.append(row)
    right = ("step", "memory", "of\nlimit")
    if compiled_peak_bytes:
        right = (*right, "by the\ncompiler")
    columns = ("mesh", "micro-\nbatches", "remat", "residual", *right)
    return make_table(
        "The quickest that fit", columns, rows, right, wrap=("mesh", "residual")
    )


def _format_peak(peak_bytes: float) -> str:
    return format_bytes(peak_bytes) if peak_bytes < inf else "no room"


def render_serving_tables(
    plan: ServingPlan, *, price_per_device_hour: float | None = None
) -> Group:
    """Renders a plan, with the price of an accelerator's hour in whatever currency."""
    options, point, rate = plan.options, plan.point, plan.point.tokens_per_second
    each, whole = map(format_bytes, (plan.token_cache_bytes, plan.sequence_cache_bytes))
    lines = [
        f" · {_describe_split(plan)} · cache {plan.cache} · weights {options.weights} "
        f"· requests"
        f" of {options.prompt:,} + {options.new:,} tokens\n"
        f"{plan.machine['name']}: {plan.machine['words']}\n",
        f"cache: {each} a token, {whole} a sequence of {options.length:,}",
        f"first token of a prompt alone after {format_seconds(plan.ttft_seconds)}; "
        f"{_count_sequences(point.batch)}: {format_seconds(point.tpot_seconds)} a "
        f"token, "
        f"{rate:,.0f} tokens/s, {rate / plan.devices:,.0f} a device",
    ]
    if price_per_device_hour is not None:
        price = price_per_device_hour * plan.devices / 3600 / rate
        lines.append(f"{1e6 * price:,.3g} for a million new tokens")
    head = Text.assemble(
        (plan.name, "bold"), lines[0], (format_serving_verdict(plan), "bold")
    )
    memory = [
        (name, f"{size:,.0f}", format_bytes(size)) for name, size in plan.memory.items()
    ]
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
    sizes, times = ("bytes", ""), ("time", "share")
    rates = ("step", "a token", "tokens/s", "a device")
    return Group(
        head,
        Text("\n".join(lines[1:])),
        make_table("Memory of each device", ("what", *sizes), memory, sizes),
        make_table(
            f"A step of {_count_sequences(point.batch)}", ("what", *times), step, times
        ),
        make_table("By sequences at once", ("sequences", *rates), curve, rates),
    )


def _count_sequences(count: int) -> str:
    return f"{count:,} sequence{'' if count == 1 else 's'}"


def format_serving_verdict(plan: ServingPlan) -> str:
    """Formats whether it fits and is in time, and what to do where not."""
    total, limit = (format_bytes(plan.memory[name]) for name in ("total", "limit"))
    need = f"{total} of {limit} a device"
    if not plan.fits:
        need += f", of which {FILL:.0%} are filled at most"
        what = (
            f"{_count_sequences(plan.point.batch)} need {need}; {plan.max_batch:,} fit"
        )
        if not plan.max_batch:
            what = f"not one sequence a replica: {need}"
        return (
            f"does not fit: {what}; split over more devices (tensor in --mesh), or "
            f"choose a "
            "smaller --cache, --batch or --prompt"
        )
    words = f"fits: {need}, {_count_sequences(plan.max_batch)} at most"
    missed = []
    for name, most, value in (
        ("first token", plan.options.ttft_ms, plan.ttft_seconds),
        ("token", plan.options.tpot_ms, plan.point.tpot_seconds),
    ):
        if most is not None and 1e3 * value > most:
            missed.append(
                f"{format_seconds(value)} a {name}, not {format_seconds(most / 1e3)}"
            )
    return f"{words}, but too slow: {' and '.join(missed)}" if missed else words


def render_serving_search(plans: list[ServingPlan], top: int) -> Group:
    """Renders the best of a search."""
    good = [plan for plan in plans if plan.is_feasible]
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
