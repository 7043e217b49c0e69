"""``maxlm eval report`` and ``maxlm eval diff``: evaluations side by side."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli.common import make_numeric_table, open_console


def report(
    folders: Annotated[list[Path], Argument(help="Runs, folders of results, or results files.")],
    output: Annotated[Path, Option(help="The page, .html; JSON beside it.")] = Path("report.html"),
    samples: Annotated[int, Option(min=0, help="At most so many of each task or group.")] = 20,
) -> None:
    """Write a page of evaluations: tasks by models, subjects, checkpoints, samples, cost."""
    from maxlm.evaluation.report import build_report, write_report
    from maxlm.evaluation.results import find_evaluations

    found = [each for folder in folders for each in find_evaluations(folder)]
    print("written:", *write_report(build_report(found, samples), output))


def compare(
    first: Annotated[Path, Argument(help="A run, folder of results, or results file: A.")],
    second: Annotated[Path, Argument(help="Another: B.")],
    alpha: Annotated[float, Option(min=1e-6, max=0.5, help="Chance of any false finding.")] = 0.05,
    tasks: Annotated[str, Option(help="Tasks or groups, by commas; default: all.")] = "",
) -> None:
    """Compare two evaluations by paired tests; exit with 1 if a task of B falls significantly."""
    from maxlm.evaluation.compare import compare_evaluations
    from maxlm.evaluation.results import find_evaluations

    a, b = (find_evaluations(folder)[-1] for folder in (first, second))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found, skipped = compare_evaluations(a, b, names, alpha)
    columns = ["A", "B", "B - A", f"{1 - alpha:.3g} interval", "p", "docs", "verdict"]
    table = make_numeric_table("task", columns)
    table.box = None
    for each in found:
        large = max(map(abs, each.interval)) >= 1000
        form, near = ("{:.4g}", "{:.3g} to {:.3g}") if large else ("{:.3f}", "{:.2f} to {:.2f}")
        change = each.second - each.first
        figures = [form.format(value) for value in (each.first, each.second, change)]
        figures += [near.format(*each.interval), f"{each.p:.3g}"]
        table.add_row(f"{each.task} {each.metric}", *figures, f"{each.num_docs:,}", each.verdict)
    open_console().print(table)
    notes = [f"A: {a.path}", f"B: {b.path}", *(note for each in found for note in each.notes)]
    print(*notes, *(f"not compared: {each}" for each in skipped), sep="\n")
    if any(each.verdict == "falls" for each in found):
        raise typer.Exit(1)
