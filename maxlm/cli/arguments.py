"""Arguments and options that several verbs take."""

from typing import Annotated

import typer

ConfigArgument = Annotated[
    str, typer.Argument(help="A YAML file, or a shipped config: demo, llama3_8b.")
]
SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, as key.path=value."),
]
TextArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT...", help="Corpora, files, folders, quoted globs, or python-stdlib."
    ),
]
TextFieldOption = Annotated[str, typer.Option(help="JSON key or Parquet column.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=EXPRESSION: a rule to try instead of, or beside, the recipe's."),
]
MachineOption = Annotated[
    str | None, typer.Option(help="The machine: v5p-256, 2xv5p-512, v5e-256, h100x64, cpux8, ...")
]
StepOption = Annotated[int | None, typer.Option(help="Which checkpoint; default: the newest.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
