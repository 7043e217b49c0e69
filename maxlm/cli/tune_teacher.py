"""``maxlm tune store-logits`` and ``answers``: what a teacher says of rows, and to them."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import MeshOption, ModelArgument, SettingsArgument, StepOption

RowsArgument = Annotated[Path, Argument(exists=True, help="Rows: .jsonl, .parquet, a dataset.")]


def store_logits(
    model: ModelArgument,
    data: RowsArgument,
    out: Annotated[Path, Argument(help="File.arrow of rows to write, for task.kind=distill.")],
    settings: SettingsArgument = None,
    k: Annotated[int, Option(min=1, help="Likeliest tokens to keep of each.")] = 64,
    temperature: Annotated[float, Option(min=0.01, help="The task's.")] = 1.0,
    seq_len: Annotated[int | None, Option(min=2, help="Tokens of a row at most.")] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write rows with a teacher's likeliest tokens, and the probability of all others, beside each
    token to learn: then maxlm tune distill --data OUT needs no teacher. Settings are those of the
    task sft that say what is learnt, as turns=last."""
    from maxlm.programs.distillation import store_teacher_logits

    own = {"k": k, "temperature": temperature, "seq_len": seq_len, "mesh": mesh, "step": step}
    counts = store_teacher_logits(model, [data], out, settings=settings or (), **own)
    print(f"{counts.written} rows in {out}, {counts.left_out} left out")


def write_answers(
    model: ModelArgument,
    data: RowsArgument,
    out: Annotated[Path, Argument(help="File of rows to write, for task.kind=sft.")],
    settings: SettingsArgument = None,
    num_answers: Annotated[int, Option("-n", min=1, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float, Option(min=0)] = 1.0,
    top_p: Annotated[float | None, Option(min=0.01, max=1)] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 512,
    seed: Annotated[int, Option(min=0)] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write a teacher's answers to the prompts of rows, for maxlm tune sft to learn. Settings are
    the engine's, as max_sequences=32."""
    from maxlm.programs.distillation import generate_answers

    own = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    own |= {} if top_p is None else {"top_p": top_p}
    how = {"num_answers": num_answers, "mesh": mesh, "step": step, "settings": settings or ()}
    counts = generate_answers(model, [data], out, **how, **own)
    print(f"{counts.written} answers in {out}, {counts.left_out} left out")
