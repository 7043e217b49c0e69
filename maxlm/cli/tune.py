"""maxlm tune"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from maxlm.train.program import TrainingProgram

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
        Option(min=0.01, help="Passes over all rows, in place of train.steps."),
    ] = None,
    precompute_reference: Annotated[
        bool,
        Option(
            "--precompute-reference",
            help="Compute the reference's log-probabilities first, then free it.",
        ),
    ] = False,
    resume: Annotated[
        str | None, Option(help="Continue from this run, in a new folder.")
    ] = None,
    profile: Annotated[
        str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")
    ] = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Tune a pretrained model: to answer (sft), to prefer (dpo, kto, orpo, cpo), to
    score answers (reward), to imitate another model (distill). The same command
    resumes an interrupted run.

    maxlm tune sft_lora --base SmolLM2-135M --data chats.jsonl name=assistant

    `maxlm tune show` shows what is learnt; `maxlm tune store-logits` and `answers` ask
    a teacher.

    A recipe is a run's config: `maxlm plan` and `maxlm launch` take it too.
    """
    from maxlm.run.load_config import load_run_config

    all_settings = []
    if base:
        all_settings.append(f"train.start_from={base}")
    if data:
        files = json.dumps([str(path) for path in data])
        all_settings.append(f"task.files={files}")
    all_settings += settings or ()
    run = load_run_config(recipe, all_settings)
    if run.train.start_from is None:
        message = "a recipe tunes a model that is there, and none is named"
        fix = "name a run's folder, or a Hugging Face one"
        raise MaxlmError(message, where="--base", fix=fix)

    def load_program() -> "TrainingProgram":
        from maxlm.tune.program import tune_model

        return partial(
            tune_model, epochs=epochs, precompute_reference=precompute_reference
        )

    cluster_variables = make_cluster_variables(coordinator, num_processes, process_id)
    run_training(run, resume, profile, cluster_variables, load_program)


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
        str | None, Option(help="sft, dpo, kto, ...; default: by the columns.")
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
    k: Annotated[
        int, Option(min=1, help="Likeliest tokens to store for each token.")
    ] = 64,
    temperature: Annotated[
        float, Option(min=0.01, help="The task's temperature.")
    ] = 1.0,
    seq_len: Annotated[int | None, Option(min=2, help="Most tokens of a row.")] = None,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write rows with a teacher's likeliest tokens, and the probability of all others,
    beside each token to learn: then maxlm tune distill --data OUT needs no teacher.
    Settings are those of the task sft that say what is learnt, as turns=last."""
    from maxlm.tune.teachers import store_teacher_logits

    written, left_out = store_teacher_logits(
        model,
        [data],
        out,
        k=k,
        temperature=temperature,
        seq_len=seq_len,
        settings=settings or (),
        mesh=mesh,
        step=step,
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
    temperature: Annotated[
        float, Option(min=0, help="0: the likeliest token; higher: more random.")
    ] = 1.0,
    top_p: Annotated[
        float | None,
        Option(min=0.01, max=1, help="Draw from this probability mass; 1: all."),
    ] = None,
    max_new_tokens: Annotated[
        int, Option(min=1, help="Most tokens of an answer.")
    ] = 512,
    seed: Annotated[int, Option(min=0, help="Seed of the draws.")] = 0,
    mesh: MeshOption = None,
    step: StepOption = None,
) -> None:
    """Write a teacher's answers to the prompts of rows, for maxlm tune sft to learn.
    Settings are the engine's, as max_sequences=32."""
    from maxlm.config.sampling import SamplingConfig
    from maxlm.tune.teachers import generate_answers

    sampling = SamplingConfig(
        temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    if top_p is not None:
        sampling = sampling.model_copy(update={"top_p": top_p})
    written, left_out = generate_answers(
        model,
        [data],
        out,
        num_answers=num_answers,
        settings=settings or (),
        mesh=mesh,
        step=step,
        sampling=sampling,
    )
    print(f"{written} answers in {out}, {left_out} left out")


subcommands = {"show": show, "store-logits": store_logits, "answers": write_answers}
