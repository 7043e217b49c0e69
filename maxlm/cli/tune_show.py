"""``maxlm tune show``: examples of rows as a task reads them."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import JsonOption, SettingsArgument, open_console, print_json


def show(
    data: Annotated[Path, Argument(help="A .jsonl (.gz, .zst) or .parquet, or a saved dataset.")],
    settings: SettingsArgument = None,
    *,
    model: Annotated[str, Option(help="A run's folder, a Hugging Face one, or a tokenizer's.")],
    kind: Annotated[str | None, Option(help="sft, dpo, kto, ...; default: as columns say.")] = None,
    examples: Annotated[int, Option("-n", "--examples", min=0, help="Rows to print.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Print rows as a task reads them, what is learnt in colour or between « », and count what is
    cut or left out. Settings are a run's, as task.turns=last data.seq_len=512."""
    from maxlm.programs.show_examples import describe_examples, render_examples

    report = describe_examples(data, model, settings or (), kind=kind, num_examples=examples)
    if as_json:
        print_json(report)
        return
    console = open_console()
    console.print(render_examples(report, in_colour=console.is_terminal), soft_wrap=True)
