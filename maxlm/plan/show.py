"""Plans as tables for a terminal."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from maxlm.models.architectures.runs import strip_stack_name
from maxlm.plan.known_errors import format_known_time_errors
from maxlm.plan.layout import ParamRow, RunLayout
from maxlm.plan.phases import GENERATION
from maxlm.plan.predict import TRAINING_STEP, RunPlan
from maxlm.plan.search import SearchResult
from maxlm.plan.timing import StepTime

# Hoffmann et al. 2022 (arXiv 2203.15556): about as many tokens a parameter are
# compute-optimal.
OPTIMAL_TOKENS_PER_PARAMETER = 20


def format_bytes(size: float) -> str:
    """Formats ``1.5 GiB``: three significant digits, binary units."""
    sign = "-" if size < 0 else ""
    size = abs(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        # 1023.5 and more would be rounded to 1024 of the unit.
        if size < 1023.5:
            return f"{sign}{_three_digits(size)} {unit}"
        size /= 1024
    return f"{sign}{_three_digits(size)} TiB"


_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def format_count(count: float) -> str:
    """Formats ``6.74B``: thousands, millions, billions, trillions."""
    for unit_size, unit in _COUNT_UNITS:
        if count >= unit_size:
            return f"{_three_digits(count / unit_size)}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """Formats ``1.5 ms``, ``12 s``, ``3.2 h``, ``14 days``."""
    if seconds < 1e-3:
        return f"{_three_digits(seconds * 1e6)} µs"
    if seconds < 1:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{_three_digits(seconds)} s"
    if seconds < 7200:
        return f"{_three_digits(seconds / 60)} min"
    hours = seconds / 3600
    if hours < 72:
        return f"{_three_digits(hours)} h"
    return f"{_three_digits(hours / 24)} days"


def _three_digits(value: float) -> str:
    """Formats three significant digits, never in scientific notation."""
    if value >= 99.95:  # rounded to three digits, 100 or more
        return f"{value:.0f}"
    return f"{value:.3g}"


def render_plan_tables(
    plan: RunPlan, *, price_per_device_hour: float | None = None
) -> Group:
    """Renders a plan, with the price of an accelerator's hour in whatever currency."""
    parts: list[RenderableType] = [render_layout_facts(plan.layout)]
    if plan.machine:
        machine = f"{plan.machine.name}: {plan.machine.topology.description}"
        parts.append(Text(machine))
        parts.append(Text(format_fit_verdict(plan), style="bold"))
        parts.append(Text(format_run_estimate(plan, price_per_device_hour)))
        if plan.known_time_errors:
            warning = format_known_time_errors(plan.known_time_errors)
            parts.append(Text(warning, style="bold"))
    parts.append(_render_parameters(plan.layout))
    parts.append(_render_memory(plan))
    if plan.extra.phases:
        parts.append(_render_phase_memory(plan))
    work = plan.shape.work
    if work.cache_bytes and not plan.extra.phases:
        num_tokens = work.tokens_per_row.decoder
        size = format_bytes(work.cache_bytes)
        line = f"caches of one row of {num_tokens:,} tokens in generation: {size}"
        parts.append(Text(line))
    if plan.collectives:
        parts.append(_render_communication(plan))
    if plan.time is not None:
        parts.append(_render_time(plan.time))
    if plan.time is not None and plan.extra.phases:
        parts.append(_render_phase_times(plan))
    return Group(*parts)


def render_layout_facts(layout: RunLayout) -> Text:
    """Renders a run's name, size, mesh, tokens and FLOPs, and notes on its layout."""
    split_axes = [f"{axis}={size}" for axis, size in layout.mesh.items() if size > 1]
    mesh = " ".join(split_axes) or "one of each axis"
    active = ""
    if layout.active_parameters < layout.parameters:
        active = f", {layout.active_parameters:,} of them active"
    size = (
        f" · {layout.parameters:,} parameters{active} · {layout.devices:,} devices"
        f" ({mesh})\n"
    )

    tokens_per_parameter = layout.tokens_total / layout.parameters
    if tokens_per_parameter >= 1000:
        ratio = format_count(tokens_per_parameter)
    else:
        ratio = f"{tokens_per_parameter:.3g}"
    share_of_optimal = tokens_per_parameter / OPTIMAL_TOKENS_PER_PARAMETER
    tokens = (
        f"{layout.tokens_per_step:,} tokens a step · "
        f"{format_count(layout.tokens_total)} in the run"
        f" ({ratio} a parameter, "
        f"{share_of_optimal:.2g}× of {OPTIMAL_TOKENS_PER_PARAMETER}:1)\n"
    )

    flops = (
        f"{layout.flops_per_token:.4g} FLOPs a token with causal attention at half,"
        f" {layout.flops_per_token_full_attention:.4g} in full"
    )
    notes = [f"\n{note}" for note in layout.notes]
    return Text.assemble((layout.name, "bold"), size, tokens, flops, *notes)


def format_prediction(plan: RunPlan) -> str:
    """Formats the time of a step and the memory of a device in a line."""
    memory = _format_memory_need(plan)
    if plan.step_seconds is None or plan.mean_step_seconds is None:
        return memory
    seconds = format_seconds(plan.mean_step_seconds)
    mfu = f"MFU {plan.mfu():.1%}"
    if plan.extra.phases:
        mfu += f" in the {format_seconds(plan.step_seconds)} that train"
    return f"{seconds} a step, {mfu}, {memory}"


def _format_memory_need(plan: RunPlan) -> str:
    """Formats ``61.2 GiB of 80 GiB a device``, with the phase of the run that needs
    them where it has several."""
    need = format_bytes(plan.peak_bytes)
    if plan.memory_limit_bytes is not None:
        need += f" of {format_bytes(plan.memory_limit_bytes)}"
    need += " a device"
    if plan.extra.phases:
        need += f" in phase '{plan.peak_phase}'"
    return need


def format_fit_verdict(plan: RunPlan) -> str:
    """Formats whether a run fits a machine's memory, and what to do where not."""
    assert plan.memory_limit_bytes is not None
    need = _format_memory_need(plan)
    if plan.barely_fits:
        return f"fits, but closer than the plan is sure of: {need}; ask --compile"
    if plan.fits:
        spare = 1 - plan.peak_bytes / plan.memory_limit_bytes
        return f"fits: {need}, {spare:.0%} to spare"
    if plan.peak_phase == GENERATION:
        return (
            f"does not fit: {need}; lower the engine's max_sequences or lengths, split "
            "over more devices (mesh.tensor splits its parameters and caches), or let "
            "--search choose"
        )
    return (
        f"does not fit: {need}; raise train.micro_batches, choose a model.remat that "
        "keeps less, split over more devices, or let --search choose"
    )


LEAST_WRAPPED_WIDTH = 16
"""Characters that are left to a column that may wrap, however long the others are."""

LONGEST_WHOLE_WORD = 20
"""Characters of a word that is never cut in two, whatever the width."""


@dataclass(frozen=True)
class FittedTable:
    """A table whose numbers and words are whole at any width: where it is too wide,
    columns that may wrap get narrow first, then all but those of numbers.

    Args:
        right: names of columns that are aligned to the right.
        wrap: names of columns that may wrap.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Container[str]
    wrap: Container[str] = ()

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Table]:
        """Yields the table for the console's width."""
        table = Table(box=None, pad_edge=False)
        widths = self._fit_widths(options.max_width)
        for name, width in zip(self.columns, widths, strict=True):
            justify = "right" if name in self.right else "left"
            table.add_column(
                name,
                justify=justify,
                min_width=width,
                max_width=width,
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*row)
        yield table

    def _fit_widths(self, max_width: int) -> list[int]:
        """Returns each column's characters, in all as many as there are, if they hold
        every number and word."""
        cells = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in cells]
        least_widths = [
            width if name in self.right else _longest_word(column)
            for name, width, column in zip(self.columns, widths, cells, strict=True)
        ]
        gaps = 2 * (len(widths) - 1)
        wrapping = [i for i, name in enumerate(self.columns) if name in self.wrap]
        for columns, least in (
            (wrapping, LEAST_WRAPPED_WIDTH),
            (range(len(widths)), 0),
        ):
            while sum(widths) + gaps > max_width:
                can_shrink = [
                    i for i in columns if widths[i] > max(least, least_widths[i])
                ]
                if not can_shrink:
                    break
                widths[max(can_shrink, key=widths.__getitem__)] -= 1
        return widths


def _longest_word(cells: Iterable[str]) -> int:
    """Returns the length of the cells' longest word; one that is too long to be kept
    whole, as a parameter's name, does not count."""
    words = [word for cell in cells for word in cell.split()]
    return max((n for n in map(len, words) if n <= LONGEST_WHOLE_WORD), default=1)


def make_table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Container[str],
    wrap: Container[str] = (),
) -> Group:
    """Makes a :class:`FittedTable` under a title, which may be wider."""
    table = FittedTable(columns, list(rows), right, wrap)
    if title is None:
        return Group(table)
    return Group(Text(f"\n{title}", style="italic"), table)


def _render_parameters(layout: RunLayout) -> Group:
    rows = []
    for row in layout.rows:
        cells = (
            row.path,
            _format_dimensions(row),
            format_bytes(row.bytes_total),
            format_bytes(row.bytes_per_device),
            str(row.replicas),
        )
        rows.append(cells)
    dimensions = "layout: logical axis = size → mesh axes"
    sizes = ("bytes", "a device", "copies")
    columns = ("parameter", dimensions, *sizes)
    dtypes = ", ".join(sorted({row.dtype for row in layout.rows}))
    title = f"Parameters ({dtypes})"
    return make_table(title, columns, rows, right=sizes, wrap=(dimensions,))


def _format_dimensions(row: ParamRow) -> str:
    """Formats ``layers=32 · embed=4096→fsdp · mlp=14336→tensor``."""
    dimensions = []
    for axis, size, mesh_axes in zip(row.axes, row.shape, row.spec, strict=True):
        dimension = f"{axis}={size}" if axis else str(size)
        if mesh_axes:
            dimension += f"→{'+'.join(mesh_axes)}"
        dimensions.append(dimension)
    return " · ".join(dimensions)


def _render_memory(plan: RunPlan) -> Group:
    memory = plan.memory
    peak_phase = memory.peak_phase
    # An adapter's base may be in bfloat16 or quantized.
    are_fp32 = all(row.dtype == "float32" for row in plan.layout.rows)
    parts = {
        "parameters (fp32)" if are_fp32 else "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "moving average (fp32)": memory.average,
        "frozen models (fp32)": memory.frozen,
        "batch": memory.batch,
        "gradients": memory.gradients,
        f"activations kept ({plan.shape.remat})": memory.activations,
        f"working set of {peak_phase}": memory.working,
        "the engine's caches": memory.caches,
    }
    for name, size in memory.working_sets[peak_phase].items():
        parts[f"  {name}"] = size
    parts["together"] = memory.total
    if plan.memory_limit_bytes is not None:
        parts["limit"] = plan.memory_limit_bytes
        parts["margin"] = plan.memory_limit_bytes - float(memory.total)
    rows = []
    for name, part in parts.items():
        size = float(part)
        if size:
            rows.append((name, f"{size:,.0f}", format_bytes(size)))
    title = "Memory of each device, at the peak of a step"
    return make_table(title, ("what", "bytes", ""), rows, right=("bytes", ""))


class _TrafficKey(NamedTuple):
    """Collectives that share a row of the table."""

    content: str
    kind: str
    over: str
    """Mesh axes, and the links they run over."""
    hides: str


@dataclass
class _Traffic:
    runs: int = 0
    sent_bytes: float = 0.0
    seconds: float = 0.0


def _render_communication(plan: RunPlan) -> Group:
    """Renders collectives: those of all kernels together, and both passes."""
    paths = [strip_stack_name(row.path) for row in plan.layout.rows]
    kernel_names = {path.partition(".kernel")[0] for path in paths} | {"head"}
    # Layers of several kinds have stacks of further names.
    for stack in plan.shape.work.stacks:
        for group in stack.matmul_groups:
            kernel_names |= {kernel.name for kernel in group.kernels}
    rows_by_key: dict[_TrafficKey, _Traffic] = {}
    for collective in plan.collectives:
        # "mlp.up" or "mlp.up: gradient" of a kernel: a row for all kernels.
        content = collective.content
        owner, _, array = content.partition(": ")
        if owner in kernel_names:
            content = f"kernels: {array}s" if array else "kernels"
        over = ", ".join(collective.axes)
        if collective.link:
            over = f"{over} ({collective.link})"
        hides = "waits" if collective.waits else "can hide it"
        key = _TrafficKey(content, collective.kind, over, hides)
        row = rows_by_key.setdefault(key, _Traffic())
        row.runs += collective.count
        row.sent_bytes += collective.sent_bytes
        row.seconds += collective.seconds or 0.0

    has_times = plan.machine is not None
    rows = []
    for key, row in rows_by_key.items():
        cells = [key.content, key.kind, key.over, f"{row.runs:,}"]
        cells.append(format_bytes(row.sent_bytes))
        if has_times:
            cells.append(format_seconds(row.seconds))
        cells.append(key.hides)
        rows.append(cells)
    columns = ["what", "kind", "over", "runs", "sent"]
    if has_times:
        columns.append("time")
    columns.append("computation")
    title = "Communication of each device, in a step"
    right = ("runs", "sent", "time")
    return make_table(title, columns, rows, right=right, wrap=("what", "over"))


def _render_time(time: StepTime) -> Group:
    parts = {
        "matrix products": time.products,
        "attention": time.attention,
        "element-wise maps, optimizer": time.traffic,
        "communication that nothing hides": time.exposed,
        "pipeline idle": time.idle,
        "together": time.total,
    }
    total = float(time.total)
    rows = []
    for name, part in parts.items():
        seconds = float(part)
        if seconds:
            rows.append((name, format_seconds(seconds), f"{seconds / total:.1%}"))
    columns = ("what", "time", "share")
    return make_table("Time of a step", columns, rows, right=columns[1:])


def _render_phase_memory(plan: RunPlan) -> Group:
    """Renders the peak of each phase of a run, and the parts of those beside the
    training step."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, size: float) -> None:
        if size:
            rows.append((name, f"{size:,.0f}", format_bytes(size)))

    for phase in plan.extra.phases:
        add(phase.name, float(phase.total_bytes))
        for part, size in phase.memory.items():
            add(f"  {part}", float(size))
    add(TRAINING_STEP, plan.bytes_by_phase[TRAINING_STEP])
    title = "Memory of each device, at the peak of each phase"
    return make_table(title, ("phase", "bytes", ""), rows, right=("bytes", ""))


def _render_phase_times(plan: RunPlan) -> Group:
    """Renders the time of a rollout and the steps that it serves."""
    assert plan.step_seconds is not None
    assert plan.mean_step_seconds is not None
    num_steps = plan.steps_per_rollout
    total = num_steps * plan.mean_step_seconds
    rows: list[tuple[str, str, str, str]] = []

    def add(name: str, step_seconds: float, step_tokens: float | None = None) -> None:
        seconds = num_steps * step_seconds
        rate = ""
        if step_tokens is not None and step_seconds:
            rate = format_count(step_tokens / step_seconds)
        rows.append((name, format_seconds(seconds), f"{seconds / total:.1%}", rate))

    for phase in plan.extra.phases:
        add(phase.name, float(phase.total_seconds), phase.tokens)
        if len(phase.seconds) > 1:
            for part, seconds in phase.seconds.items():
                add(f"  {part}", float(seconds))
    name = TRAINING_STEP if num_steps == 1 else f"{num_steps:,} {TRAINING_STEP}s"
    add(name, plan.step_seconds, plan.layout.tokens_per_step)
    add("together", plan.mean_step_seconds)
    figures = ("time", "share", "tokens/s")
    title = "Time of a rollout and its steps"
    return make_table(title, ("phase", *figures), rows, right=figures)


def format_run_estimate(
    plan: RunPlan, price_per_device_hour: float | None = None
) -> str:
    """Formats rates, the whole run, and the cost of failures."""
    layout = plan.layout
    goodput = plan.goodput
    step_seconds = plan.step_seconds
    mean_step_seconds = plan.mean_step_seconds
    hours = plan.run_hours
    assert step_seconds is not None
    assert mean_step_seconds is not None
    assert goodput is not None

    tokens_per_second = layout.tokens_per_step / step_seconds
    tokens_per_device = tokens_per_second / layout.devices
    rates = (
        f"{format_seconds(step_seconds)} a step · "
        f"{format_count(tokens_per_second)} tokens/s, "
        f"{format_count(tokens_per_device)} a device · "
        f"MFU {plan.mfu():.1%} (attention at half), "
        f"{plan.mfu(full_attention=True):.1%} (in full)"
    )
    lines = [rates]
    if plan.extra.phases:
        shares = [
            f"{phase.name} {float(phase.total_seconds) / mean_step_seconds:.0%}"
            for phase in plan.extra.phases
        ]
        lines.append(
            f"{format_seconds(mean_step_seconds)} from a step to the next, of which "
            f"{', '.join(shares)}"
        )

    if hours is not None:
        steps = layout.tokens_total // layout.tokens_per_step
        device_hours = hours * layout.devices
        line = f"{steps:,} steps in {format_seconds(3600 * hours)}, "
        line += f"{device_hours:,.0f} device-hours"
        if price_per_device_hour is not None:
            price = price_per_device_hour * hours * layout.devices
            line += f", {price:,.0f} at {price_per_device_hour:g} each"
        lines.append(line)

    best_interval = goodput.best_interval_seconds
    best_steps = max(1, round(best_interval / mean_step_seconds))
    configured = "none are configured"
    if plan.checkpoint_every:
        configured = (
            f"{goodput.configured:.1%} with every {plan.checkpoint_every:,} "
            f"as configured"
        )
    mtbf_seconds = 3600 * goodput.mtbf_hours
    failures = (
        f"goodput {goodput.best:.1%} with a checkpoint every {best_steps:,} steps "
        f"({format_seconds(best_interval)}), {configured}; "
        f"a failure every {format_seconds(mtbf_seconds)}"
    )
    lines.append(failures)
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
        split_axes = [
            f"{axis}={size}" for axis, size in candidate.sizes.items() if size > 1
        ]
        share_of_limit = candidate.memory / memory_limit_bytes
        cells = [
            " ".join(split_axes) or "one device",
            str(candidate.micro_batches),
            candidate.remat,
            ", ".join(candidate.residual) or "whole",
            format_seconds(candidate.seconds),
            format_bytes(candidate.memory),
            f"{share_of_limit:.0%}",
        ]
        if place < len(compiled_peak_bytes):
            cells.append(_format_peak(compiled_peak_bytes[place]))
        elif compiled_peak_bytes:
            cells.append("")
        rows.append(cells)
    right = ("step", "memory", "of\nlimit")
    if compiled_peak_bytes:
        right = (*right, "by the\ncompiler")
    columns = ("mesh", "micro-\nbatches", "remat", "residual", *right)
    return make_table(
        "The quickest that fit", columns, rows, right, wrap=("mesh", "residual")
    )


def _format_peak(peak_bytes: float) -> str:
    return format_bytes(peak_bytes) if peak_bytes < inf else "no room"
