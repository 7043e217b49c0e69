"""``maxlm runs``: how far runs are, and where their time went."""

import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli.common import JsonOption, open_console, print_json

app = typer.Typer(help="List runs; show how far one is and where its time went.")


@app.command("list")
def list_runs(
    folder: Annotated[str, Argument(help="The folder that runs lie in.")] = "runs",
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder: step, state, loss, goodput."""
    from maxlm.train import runs

    found = runs.list_runs(folder)
    if as_json:
        print_json([run.to_json() for run in found])
    else:
        open_console().print(
            runs.show_run_list(found) if found else f"no runs in {folder}"
        )


@app.command()
def show(
    run: Annotated[str, Argument(help="A run's folder.")],
    image: Annotated[
        Path | None, Option(help="File to draw it in over time: .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run's goodput, what else its time went to, its interruptions, how long
    steps take."""
    from maxlm.train.history_image import draw_history
    from maxlm.train.runs import read_run, show_run

    now = time.time()
    found = read_run(run, now)
    if image is not None:
        draw_history(found.history, image, title=found.name)
    if as_json:
        print_json(found.to_json())
    else:
        open_console().print(show_run(found, now))
