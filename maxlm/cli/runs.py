"""``maxlm runs``: how far runs are, and where their time went."""

from typing import Annotated, Any

import typer

from maxlm.cli.arguments import JsonOption

app = typer.Typer(help="List runs; show how far one is and where its time went.")


@app.command("list")
def list_runs(
    folder: Annotated[str, typer.Argument(help="The folder that runs lie in.")] = "runs",
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder: step, state, loss, goodput."""
    from maxlm.programs import runs

    found = runs.list_runs(folder)
    if as_json:
        _print_json([run.to_json() for run in found])
        return
    from rich.console import Console

    from maxlm.programs.show_runs import show_run_list

    Console(highlight=False).print(show_run_list(found) if found else f"no runs in {folder}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Show a run's goodput, what else its time went to, its interruptions, how long steps take; and
    draw it."""
    import sys
    import time
    from pathlib import Path

    from maxlm.config import MaxlmError
    from maxlm.programs.runs import read_run

    now = time.time()
    found = read_run(run, now)
    if as_json:
        _print_json(found.to_json())
        return
    from rich.console import Console

    from maxlm.programs.show_runs import show_run
    from maxlm.programs.timeline import draw_history

    Console(highlight=False).print(show_run(found, now))
    if not found.history.wall:
        return
    image = Path(run) / "plots" / "goodput.png"
    try:
        draw_history(found.history, image, title=found.name)
    except MaxlmError as error:  # Another's run can be looked at, if not written to.
        print(f"not drawn: {error}", file=sys.stderr)
    else:
        print(f"drawn: {image}")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))
