"""maxlm tune"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from maxlm.cli.common import SettingsArgument, join_training_session
from maxlm.cli.tune_show import show
from maxlm.cli.tune_teacher import store_logits, write_answers

RecipeArgument = Annotated[
    str, Argument(help="A YAML file, or a recipe of configs/tune: sft_lora, dpo_lora, reward.")
]
BaseOption = Annotated[
    str | None, Option(help="The model to tune: a run's folder, or a Hugging Face checkpoint's.")
]
DataOption = Annotated[
    list[Path] | None, Option(exists=True, help="Rows to train on; once for each file.")
]


def command(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    base: BaseOption = None,
    data: DataOption = None,
    epochs: Annotated[
        float | None, Option(min=0.01, help="Times that every row is read: train.steps.")
    ] = None,
    precompute_reference: Annotated[
        bool,
        Option(
            "--precompute-reference",
            help="Compute the reference's log-probabilities first, and hold it no more.",
        ),
    ] = False,
    resume: Annotated[str | None, Option(help="Go on from this run, in a new folder.")] = None,
    profile: Annotated[str | None, Option(help="Trace steps 10 to 13 for xprof: 10:13.")] = None,
) -> None:
    """Tune a pretrained model: to answer (sft), to prefer (dpo, kto, orpo, cpo), to score answers
    (reward), to imitate another model (distill). Called again, it resumes.

    maxlm tune sft_lora --base SmolLM2-135M --data chats.jsonl name=assistant

    `maxlm tune show` shows what is learnt; `maxlm tune store-logits` and `answers` ask a teacher.

    A recipe is a run's config: `maxlm plan` and `maxlm launch` take it too.
    """
    import json

    from maxlm.config import MaxlmError
    from maxlm.programs.run_config import load_run_config

    own = [f"train.start_from={base}"] if base else []
    own += [f"task.files={json.dumps([str(path) for path in data])}"] if data else []
    run = load_run_config(recipe, [*own, *(settings or ())])
    if run.train.start_from is None:
        fix = "name a run's folder, or a Hugging Face one"
        what = "a recipe tunes a model that is there, and none is named"
        raise MaxlmError(what, where="--base", fix=fix)
    from maxlm.train.profile import parse_steps

    traced = parse_steps(profile) if profile else None
    with join_training_session(run):
        from maxlm.programs.report import print_training_report
        from maxlm.programs.tune import tune_model

        how = {"epochs": epochs, "precompute_reference": precompute_reference}
        print_training_report(tune_model(run, **how, resume=resume, profile=traced))


subcommands = {"show": show, "store-logits": store_logits, "answers": write_answers}
