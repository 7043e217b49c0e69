"""Arguments, options and output that several verbs share."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

if TYPE_CHECKING:
    from maxlm.run.config import RunConfig

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
    int | None, Option(min=1, help="Processes; by default one a core.")
]
KeepOption = Annotated[
    list[str] | None,
    Option(help="NAME=EXPRESSION: a rule to try instead of, or beside, the recipe's."),
]
SetOption = Annotated[
    list[str] | None, Option("--set", help="KEY=VALUE of its settings.")
]
ModelArgument = Annotated[
    str, Argument(help="A run's folder, or a Hugging Face checkpoint's.")
]
MeshOption = Annotated[
    str | None, Option(help="Devices by axis, such as tensor=2; default: one device.")
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
    Option(help="How many processes there are; default: $MAXLM_NUM_PROCESSES."),
]
ProcessIdOption = Annotated[
    int | None, Option(help="Which one this is, from 0; default: $MAXLM_PROCESS_ID.")
]


def make_cluster_variables(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, str]:
    """Return the options that say a process's place as the variables that mean the
    same."""
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
    tuning: dict[str, Any] | None = None,
) -> None:
    """Train a run, or tune it with these options of ``tune_model``, and print its
    report; all of its processes join, and each takes as much of a GPU's memory as plans
    say."""
    from maxlm.plan.hardware import GPU_SHARE
    from maxlm.runtime.session import distributed_session
    from maxlm.train.profile import parse_steps

    traced = parse_steps(profile) if profile else None
    # Read when JAX starts.
    if (
        "XLA_CLIENT_MEM_FRACTION" not in os.environ
    ):  # its newer name: JAX refuses both at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    with distributed_session(
        run.model_dump(mode="json"),
        join_timeout_seconds=run.faults.join_seconds,
        peer_timeout_seconds=run.faults.peer_seconds,
        cluster_variables=cluster_variables,
    ):
        from maxlm.train.program import train_model as train
        from maxlm.train.report import print_training_report

        if tuning is not None:
            from maxlm.tune.program import tune_model as train
        print_training_report(
            train(run, **(tuning or {}), resume=resume, profile=traced)
        )


def print_json(value: Any) -> None:
    """Print plain data; no NaN, which is no JSON."""
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
    **style: Any,
) -> None:
    """Print a table of a column of names and columns of numbers, on the right;
    ``style``: of rich's ``Table``."""
    table = Table(first_column, **style)
    for name in numeric_columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    open_console().print(table)
