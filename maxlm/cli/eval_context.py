"""maxlm eval positions, maxlm eval passkey"""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from maxlm.cli.common import (
    JsonOption,
    MeshOption,
    ModelArgument,
    StepOption,
    make_numeric_table,
    open_console,
    print_json,
)


def show_position_perplexities(
    models: Annotated[list[str], Argument(help="Folders of runs or Hugging Face checkpoints.")],
    text: Annotated[Path, Option(exists=True, dir_okay=False, help="A file of text.")],
    length: Annotated[int | None, Option(min=3, help="Tokens; default: max_seq_len.")] = None,
    windows: Annotated[int, Option(min=1, help="Parts of the text that are read, at most.")] = 16,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show models' perplexity by the position of a token: with what context, up to --length."""
    from math import exp

    from maxlm.programs.long_context import evaluate_position_losses

    options = {"length": length, "num_windows": windows, "mesh": mesh, "step": step}
    losses = {model: evaluate_position_losses(model, text, **options) for model in models}
    if as_json:
        return print_json(
            {model: {str(n): x for n, x in own.items()} for model, own in losses.items()}
        )
    ends = sorted({end for own in losses.values() for end in own})
    table = make_numeric_table("positions", models, "perplexity")
    for start, end in zip([0, *ends], ends, strict=False):
        row = [f"{exp(own[end]):.4g}" if end in own else "" for own in losses.values()]
        table.add_row(f"{start + 1:,} to {end:,}", *row)
    open_console().print(table)


def show_passkey_accuracy(
    model: ModelArgument,
    lengths: Annotated[str, Option(help="Tokens, by commas.")],
    depths: Annotated[str, Option(help="Places of the key, in percent.")] = "0,25,50,75,100",
    samples: Annotated[int, Option(min=1, help="Keys for each length and depth.")] = 10,
    seed: Annotated[int, Option(min=0, help="Of the keys.")] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how often a model finds a number hidden in long texts, by length and depth."""
    from maxlm.programs.long_context import evaluate_passkeys

    sizes, places = _parse(lengths, "--lengths", 1, 2**31), _parse(depths, "--depths", 0, 100)
    found = evaluate_passkeys(model, sizes, places, samples, seed=seed, mesh=mesh, step=step)
    if as_json:
        return print_json({"lengths": sizes, "depths": places, "accuracy": found})
    table = make_numeric_table("length", [f"{depth}%" for depth in places], "passkeys found")
    for size, row in zip(sizes, found, strict=True):
        table.add_row(f"{size:,}", *(f"{value:.0%}" for value in row))
    open_console().print(table)


def _parse(text: str, option: str, least: int, most: int) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value <= most for value in values):
        raise BadParameter(f"{option} takes integers from {least} to {most:,} by commas")
    return values
