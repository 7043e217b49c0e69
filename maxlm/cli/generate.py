"""maxlm generate"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import ModelArgument, StepOption
from maxlm.config import MaxlmError
from maxlm.config.load import load_config


def command(
    run: ModelArgument,
    prompts: Annotated[
        list[str], Argument(metavar="PROMPT...", help="Texts; - is stdin.")
    ],
    max_new_tokens: Annotated[int | None, Option(help="Most tokens to write.")] = None,
    temperature: Annotated[
        float | None, Option(help="0: the likeliest token; higher: more random.")
    ] = None,
    top_k: Annotated[
        int | None, Option(help="Draw from this many likeliest tokens; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None, Option(help="Draw from this probability mass; 1: all.")
    ] = None,
    seed: Annotated[
        int | None, Option(help="The same seed gives the same text.")
    ] = None,
    beams: Annotated[
        int | None,
        Option(min=1, help="Search the likeliest text with this many beams."),
    ] = None,
    best_of: Annotated[
        int | None, Option(min=1, help="Draw this many texts, show the likeliest.")
    ] = None,
    items: Annotated[
        Path | None,
        Option(
            exists=True,
            dir_okay=False,
            help="An .npz of the frontend's arrays, seen before each prompt's text.",
        ),
    ] = None,
    step: StepOption = None,
) -> None:
    """Continue prompts with a trained model. Options left out are the run's `samples`
    settings."""
    from maxlm.config.sampling import SamplingConfig
    from maxlm.inference.text import (
        generate_text,
        get_prompt_separator,
        read_item_file,
        search_text,
    )
    from maxlm.run.load import load_model

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    settings = [
        f"{name}={value}" for name, value in options.items() if value is not None
    ]
    chosen = load_config(SamplingConfig, None, settings).value
    if beams and best_of:
        message = "--beams and --best-of are two ways to search"
        raise MaxlmError(message, where="command line", fix="give one of them")
    if items and (beams or best_of):
        message = "--items with a search"
        raise MaxlmError(
            message, where="command line", fix="leave --beams, --best-of out"
        )
    item_arrays = None if items is None else read_item_file(items)
    texts = [
        sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
        for prompt in prompts
    ]

    loaded = load_model(run, step=step)
    samples = loaded.config.samples.model_dump(include=set(SamplingConfig.model_fields))
    samples |= chosen.model_dump(exclude_unset=True)
    sampling = SamplingConfig(**samples)
    if beams or best_of:
        steps = search_text(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            texts,
            sampling,
            num_beams=beams,
            num_samples=best_of or 1,
        )
    else:
        steps = generate_text(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            texts,
            sampling,
            item_arrays,
        )
    _print_texts(texts, steps, get_prompt_separator(loaded.model))


def _print_texts(
    prompts: Sequence[bytes], steps: Iterator[list[str]], separator: str
) -> None:
    """Print the first text as it comes, the others when all are done; with headings if
    there are several.

    Args:
        steps: the next piece of each text, step by step.
        separator: what stands between a prompt and its text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what the terminal cannot.
        sys.stdout.reconfigure(errors="replace")

    def print_prompt(index: int) -> None:
        if len(prompts) > 1:
            print(f"──── prompt {index + 1} ────")
        prompt = prompts[index].decode("utf-8", "replace")
        print(prompt, end=separator, flush=True)

    print_prompt(0)
    others = [""] * (len(prompts) - 1)
    for first_piece, *pieces in steps:
        print(first_piece, end="", flush=True)
        others = [text + piece for text, piece in zip(others, pieces, strict=True)]
    print()
    for index, text in enumerate(others, 1):
        print()
        print_prompt(index)
        print(text)
