"""Arguments, options and output that several verbs share."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

if TYPE_CHECKING:
    from maxlm.run.config import RunConfig
    from maxlm.train.program import TrainingProgram

ConfigArgument = Annotated[
    str, Argument(help="A YAML file, or a shipped config: demo, llama3_8b.")
]
SettingsArgument = Annotated[
    list[str] | None,
    Argument(metavar="[KEY=VALUE]...", help="Settings to override, as key.path=value."),
]
TextArgument = Annotated[
    list[str],
    Argument(
        metavar="TEXT...",
        help="Corpora, files, folders, quoted globs, python-stdlib, "
        "python-package:NAME.",
    ),
]
TextFieldOption = Annotated[str, Option(help="JSON key or Parquet column.")]
WorkersOption = Annotated[
    int | None, Option(min=1, help="Processes; default: one per core.")
]
KeepOption = Annotated[
    list[str] | None,
    Option(help="NAME=EXPRESSION: a rule that replaces or joins the recipe's."),
]
SetOption = Annotated[
    list[str] | None, Option("--set", help="KEY=VALUE of the model's settings.")
]
ModelArgument = Annotated[
    str, Argument(help="A run's folder, a Hugging Face checkpoint's, or a GGUF file.")
]
MeshOption = Annotated[
    str | None, Option(help="Devices per axis, such as tensor=2; default: one device.")
]
TemplateOption = Annotated[
    Path | None,
    Option(
        "--chat-template",
        exists=True,
        dir_okay=False,
        help="A Jinja file for conversations.",
    ),
]
StepOption = Annotated[
    int | None, Option(help="Which checkpoint; default: the newest.")
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
CoordinatorOption = Annotated[
    str | None, Option(help="host:port of process 0; default: $MAXLM_COORDINATOR.")
]
NumProcessesOption = Annotated[
    int | None,
    Option(help="Number of processes; default: $MAXLM_NUM_PROCESSES."),
]
ProcessIdOption = Annotated[
    int | None, Option(help="This process, from 0; default: $MAXLM_PROCESS_ID.")
]


def make_cluster_variables(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, str]:
    """Return the options that tell a process its place in a cluster as the environment
    variables that mean the same."""
    from maxlm.runtime.cluster import COORDINATOR, NUM_PROCESSES, PROCESS_ID

    options = {
        COORDINATOR: coordinator,
        NUM_PROCESSES: num_processes,
        PROCESS_ID: process_id,
    }
    return {name: str(value) for name, value in options.items() if value is not None}


def run_training(
    run: "RunConfig",
    resume: str | None,
    profile: str | None,
    cluster_variables: dict[str, str],
    load_program: "Callable[[], TrainingProgram]",
) -> None:
    """Run a program that trains, and print its report; all of its processes join, and
    each takes as much of a GPU's memory as plans say.

    Args:
        resume: another run's folder to resume from.
        profile: steps to trace, ``10:13``.
        load_program: imports the program, which starts JAX; called once all processes
            have joined.
    """
    from maxlm.plan.hardware import GPU_MEMORY_SHARE
    from maxlm.runtime.session import distributed_session
    from maxlm.train.profile import parse_steps

    profiled_steps = parse_steps(profile) if profile else None
    # Read when JAX starts. JAX refuses this variable beside its newer name.
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
    with distributed_session(
        run.model_dump(mode="json"),
        join_timeout_seconds=run.faults.join_seconds,
        peer_timeout_seconds=run.faults.peer_seconds,
        cluster_variables=cluster_variables,
    ):
        # Imported when all processes have joined: these modules start JAX.
        from maxlm.train.report import print_training_report

        train = load_program()
        print_training_report(train(run, resume=resume, profile=profiled_steps))


def print_json(value: object) -> None:
    """Print plain data; NaN, which JSON does not have, is an error."""
    print(json.dumps(value, indent=2, allow_nan=False))


def open_console(file: TextIO | None = None) -> Console:
    """Return a console of 80 columns or more, by default on stdout; narrower tables
    break words."""
    console = Console(file=file, highlight=False)
    console.width = max(80, console.width)
    return console


def print_table(
    first_column: str,
    numeric_columns: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    with_lines: bool = True,
) -> None:
    """Print a table of a column of names, and columns of numbers aligned to the right.

    Args:
        with_lines: whether lines frame the table.
    """
    table = Table(first_column, title=title)
    if not with_lines:
        table.box = None
    for name in numeric_columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    open_console().print(table)
