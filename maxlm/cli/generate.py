"""maxlm generate"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from typer import Argument, Option

from maxlm.cli.common import ModelArgument, StepOption
from maxlm.config import MaxlmError, load_config


def command(
    context: typer.Context,
    run: ModelArgument,
    prompts: Annotated[
        list[str], Argument(metavar="PROMPT...", help="Texts; - is stdin.")
    ],
    max_new_tokens: Annotated[int | None, Option(help="Write at most so many.")] = None,
    temperature: Annotated[
        float | None, Option(help="0: the likeliest; above 1: wilder.")
    ] = None,
    top_k: Annotated[
        int | None, Option(help="Draw from so many likeliest tokens; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None, Option(help="Draw from this probability mass; 1: all.")
    ] = None,
    seed: Annotated[
        int | None, Option(help="The same seed gives the same text.")
    ] = None,
    beams: Annotated[
        int | None, Option(min=1, help="Search the likeliest text by beams.")
    ] = None,
    best_of: Annotated[
        int | None, Option(min=1, help="Draw so many, show the likeliest.")
    ] = None,
    step: StepOption = None,
) -> None:
    """Continue prompts with a trained model. Options left out are the run's `samples`
    settings."""
    from maxlm.config.sampling import SamplingConfig
    from maxlm.inference.text import generate_text, get_prompt_separator, search_text
    from maxlm.run.load import load_model

    options = {
        k: v for k, v in context.params.items() if k in SamplingConfig.model_fields
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    chosen = load_config(SamplingConfig, None, given).value.model_dump(
        exclude_unset=True
    )
    if beams and best_of:
        what, fix = "--beams and --best-of are two ways to search", "give one of them"
        raise MaxlmError(what, where="command line", fix=fix)
    texts = [sys.stdin.buffer.read() if p == "-" else os.fsencode(p) for p in prompts]

    opened = load_model(run, step=step)
    samples = opened.config.samples.model_dump(include=set(SamplingConfig.model_fields))
    sampling = SamplingConfig(**{**samples, **chosen})
    given = opened.model, opened.params, opened.tokenizer, texts, sampling
    if beams or best_of:
        steps = search_text(*given, num_beams=beams, num_samples=best_of or 1)
    else:
        steps = generate_text(*given)
    _show(texts, steps, get_prompt_separator(opened.model))


def _show(prompts: Sequence[bytes], steps: Iterator[list[str]], between: str) -> None:
    """The first text as it comes, the others when all are done; headings if there are
    several."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a model may write what the terminal cannot

    def open_text(number: int) -> None:
        if len(prompts) > 1:
            print(f"──── prompt {number} ────")
        print(prompts[number - 1].decode("utf-8", "replace"), end=between, flush=True)

    open_text(1)
    others = [""] * (len(prompts) - 1)
    for first, *rest in steps:
        print(first, end="", flush=True)
        others = [text + piece for text, piece in zip(others, rest, strict=True)]
    print()
    for number, text in enumerate(others, 2):
        print()
        open_text(number)
        print(text)
