"""maxlm tune"""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import (
    CoordinatorOption,
    JsonOption,
    MeshOption,
    ModelArgument,
    NumProcessesOption,
    ProcessIdOption,
    SettingsArgument,
    StepOption,
    make_cluster_variables,
    open_console,
    print_json,
    run_training,
)
from maxlm.config import MaxlmError

RecipeArgument = Annotated[
    str,
    Argument(
        help="A YAML file, or a recipe of configs/tune: sft_lora, dpo_lora, reward."
    ),
]
BaseOption = Annotated[
    str | None,
    Option(help="The model to tune: a run's folder, or a Hugging Face checkpoint's."),
]
DataOption = Annotated[
    list[Path] | None, Option(exists=True, help="Rows to train on; once for each file.")
]
RowsArgument = Annotated[
    Path, Argument(exists=True, help="Rows: .jsonl, .parquet, a dataset.")
]


def command(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    base: BaseOption = None,
    data: DataOption = None,
    epochs: Annotated[
        float | None,
        Option(min=0.01, help="Times that every row is read: train.steps."),
    ] = None,
    precompute_reference: Annotated[
        bool,
        Option(
            "--precompute-reference",
            help="Compute the reference's log-probabilities first, and hold it no "
            "more.",
        ),
    ] = False,
    resume: Annotated[
        str | None, Option(help="Go on from this run, in a new folder.")
    ] = None,
    profile: Annotated[
        str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")
    ] = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Tune a pretrained model: to answer (sft), to prefer (dpo, kto, orpo, cpo), to
    score answers (reward), to imitate another model (distill). Called again, it
    resumes.

    maxlm tune sft_lora --base SmolLM2-135M --data chats.jsonl name=assistant

    `maxlm tune show` shows what is learnt; `maxlm tune store-logits` and `answers` ask
    a teacher.

    A recipe is a run's config: `maxlm plan` and `maxlm launch` take it too.
    """
    from maxlm.run.load_config import load_run_config

    own = [f"train.start_from={base}"] if base else []
    own += [f"task.files={json.dumps([str(path) for path in data])}"] if data else []
    run = load_run_config(recipe, [*own, *(settings or ())])
    if run.train.start_from is None:
        what = "a recipe tunes a model that is there, and none is named"
        raise MaxlmError(
            what, where="--base", fix="name a run's folder, or a Hugging Face one"
        )
    tuning = {"epochs": epochs, "precompute_reference": precompute_reference}
    cluster_variables = make_cluster_variables(coordinator, num_processes, process_id)
    run_training(run, resume, profile, cluster_variables, tuning)


def show(
    data: Annotated[
        Path, Argument(help="A .jsonl (.gz, .zst) or .parquet, or a saved dataset.")
    ],
    settings: SettingsArgument = None,
    *,
    model: Annotated[
        str, Option(help="A run's folder, a Hugging Face one, or a tokenizer's.")
    ],
    kind: Annotated[
        str | None, Option(help="sft, dpo, kto, ...; default: as columns say.")
    ] = None,
    examples: Annotated[
        int, Option("-n", "--examples", min=0, help="Rows to print.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Print rows as a task reads them, what is learnt in colour or between « », and
    count what is cut or left out. Settings are a run's, as task.turns=last
    data.seq_len=512."""
    from maxlm.tune.examples import describe_examples, render_examples

    report = describe_examples(
        data, model, settings or (), kind=kind, num_examples=examples
    )
    if as_json:
        print_json(report)
        return
    console = open_console()
    console.print(
        render_examples(report, in_colour=console.is_terminal), soft_wrap=True
    )


def store_logits(
    model: ModelArgument,
    data: RowsArgument,
    out: Annotated[
        Path, Argument(help="File.arrow of rows to write, for task.kind=distill.")
    ],
    settings: SettingsArgument = None,
    k: Annotated[int, Option(min=1, help="Likeliest tokens to keep of each.")] = 64,
    temperature: Annotated[float, Option(min=0.01, help="The task's.")] = 1.0,
    seq_len: Annotated[
        int | None, Option(min=2, help="Tokens of a row at most.")
    ] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write rows with a teacher's likeliest tokens, and the probability of all others,
    beside each token to learn: then maxlm tune distill --data OUT needs no teacher.
    Settings are those of the task sft that say what is learnt, as turns=last."""
    from maxlm.tune.teachers import store_teacher_logits

    own = {
        "k": k,
        "temperature": temperature,
        "seq_len": seq_len,
        "mesh": mesh,
        "step": step,
    }
    written, left_out = store_teacher_logits(
        model, [data], out, settings=settings or (), **own
    )
    print(f"{written} rows in {out}, {left_out} left out")


def write_answers(
    model: ModelArgument,
    data: RowsArgument,
    out: Annotated[Path, Argument(help="File of rows to write, for task.kind=sft.")],
    settings: SettingsArgument = None,
    num_answers: Annotated[
        int, Option("-n", min=1, help="Answers to each prompt.")
    ] = 1,
    temperature: Annotated[float, Option(min=0)] = 1.0,
    top_p: Annotated[float | None, Option(min=0.01, max=1)] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 512,
    seed: Annotated[int, Option(min=0)] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write a teacher's answers to the prompts of rows, for maxlm tune sft to learn.
    Settings are the engine's, as max_sequences=32."""
    from maxlm.tune.teachers import generate_answers

    own = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    own |= {} if top_p is None else {"top_p": top_p}
    how = {
        "num_answers": num_answers,
        "mesh": mesh,
        "step": step,
        "settings": settings or (),
    }
    written, left_out = generate_answers(model, [data], out, **how, **own)
    print(f"{written} answers in {out}, {left_out} left out")


subcommands = {"show": show, "store-logits": store_logits, "answers": write_answers}
