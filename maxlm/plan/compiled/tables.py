"""Tables for a terminal: the plan beside the compiler."""

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from maxlm.plan.compiled.compare import (
    CollectiveComparison,
    CompilerVerdict,
    PlannedAndCompiled,
)
from maxlm.plan.show import format_bytes, format_count, make_table


def render_compiler_tables(verdict: CompilerVerdict) -> Group:
    """Renders what a step holds, multiplies and sends, as planned and as compiled."""
    columns = ("what", "plan", "compiler", "deviation")
    memory = [
        (name, *_format_pair(figure, format_bytes))
        for name, figure in verdict.figures.items()
    ]
    products = [
        (name, *_format_pair(figure, _format_flops))
        for name, figure in verdict.products.items()
        if figure.plan or figure.compiler
    ]
    tables: list[RenderableType] = [
        make_table(
            "Memory of each device, as planned and as compiled",
            columns,
            memory,
            right=columns[1:],
        ),
        make_table(
            "Products of each device, in a step", columns, products, right=columns[1:]
        ),
        _render_compared_collectives(verdict.collectives),
    ]
    if verdict.unknown_loops:
        count = len(verdict.unknown_loops)
        words = "1 loop whose" if count == 1 else f"{count} loops whose"
        tables.append(Text(f"{words} trips the program does not tell: counted once"))
    return Group(*tables)


def _render_compared_collectives(collectives: Sequence[CollectiveComparison]) -> Group:
    """Renders collectives by kind and mesh axes; those below a thousandth of all bytes
    together."""
    total = sum(max(row.planned_bytes, row.compiled_bytes) for row in collectives)
    large = [
        row
        for row in collectives
        if max(row.planned_bytes, row.compiled_bytes) >= 1e-3 * total
    ]
    small = [row for row in collectives if row not in large]
    if small:
        rest = CollectiveComparison(
            kind="smaller ones",
            axes="",
            planned_runs=sum(row.planned_runs for row in small),
            compiled_runs=sum(row.compiled_runs for row in small),
            planned_bytes=sum(row.planned_bytes for row in small),
            compiled_bytes=sum(row.compiled_bytes for row in small),
        )
        large.append(rest)
    rows = [
        (
            row.kind,
            row.axes.replace("+", ", "),
            f"{row.planned_runs:,}",
            f"{row.compiled_runs:,}",
            *_format_pair(
                PlannedAndCompiled(row.planned_bytes, row.compiled_bytes), format_bytes
            ),
        )
        for row in large
    ]
    right = (
        "runs,\nplanned",
        "runs,\ncompiled",
        "sent,\nplanned",
        "sent,\ncompiled",
        "deviation",
    )
    title = "Communication of each device, in a step, with every loop's trips"
    return make_table(
        title, ("kind", "over", *right), rows, right=right, wrap=("over",)
    )


def _format_flops(flops: float) -> str:
    """Formats ``1.23 GFLOP``: SI's G where counts have B."""
    count = format_count(flops)
    number = count.rstrip("TBMK")
    return f"{number} {count.removeprefix(number).replace('B', 'G')}FLOP"


def _format_pair(
    figure: PlannedAndCompiled, format_value: Callable[[float], str]
) -> tuple[str, str, str]:
    """Formats a planned and a compiled figure, and how far the plan is off."""
    planned = "" if figure.plan is None else format_value(figure.plan)
    deviation = ""
    if figure.plan and figure.compiler:
        deviation = f"{figure.plan / figure.compiler - 1:+.1%}"
    return planned, format_value(figure.compiler), deviation
