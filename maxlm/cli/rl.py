"""maxlm rl"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from maxlm.cli.common import (
    CoordinatorOption,
    NumProcessesOption,
    ProcessIdOption,
    SettingsArgument,
    make_cluster_variables,
    run_training,
)

if TYPE_CHECKING:
    from maxlm.train.program import TrainingProgram

RecipeArgument = Annotated[
    str,
    Argument(
        help="A YAML file, a recipe of configs/rl, such as qwen3_0_6b_grpo, or a method "
        "of configs/methods: grpo, grpo_lora, rloo, ppo, on_policy_distill."
    ),
]


def command(
    recipe: RecipeArgument,
    settings: SettingsArgument = None,
    base: Annotated[
        str | None,
        Option(help="The policy to start from: a run's or a Hugging Face folder."),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        Option(exists=True, help="Rows of prompts; once for each file."),
    ] = None,
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
    """Train a policy on its own answers, by what rewards say of them (grpo, rloo, ppo),
    or by a teacher (on_policy_distill). The same command resumes an interrupted run.

    maxlm rl grpo --base SmolLM2-135M --prompts questions.jsonl name=solver

    A recipe is a run's config: `maxlm plan` and `maxlm launch` take it too.

    `maxlm rl report RUN` writes a page of a run: curves, and samples with their rewards.
    `maxlm rl prompts FILE` writes an environment's prompts: each has its own --help.
    """
    from maxlm.config import MaxlmError
    from maxlm.run.load_config import load_run_config

    all_settings = []
    if base and not Path(base).expanduser().exists():
        message = f"no such folder: {base}"
        fix = "name a run's folder, or a downloaded Hugging Face one"
        raise MaxlmError(message, where="--base", fix=fix)
    if base:
        all_settings.append(f"train.start_from={base}")
    if prompts:
        files = json.dumps([str(path) for path in prompts])
        all_settings.append(f"task.environment.files={files}")
    all_settings += settings or ()
    run = load_run_config(recipe, all_settings)
    cluster_variables = make_cluster_variables(coordinator, num_processes, process_id)
    run_training(run, resume, profile, cluster_variables, _load_program)


def _load_program() -> "TrainingProgram":
    from maxlm.rl.program import train_policy

    return train_policy


def prompts(
    out: Annotated[Path, Argument(help="The .jsonl file to write.")],
    settings: SettingsArgument = None,
    count: Annotated[
        int | None,
        Option(
            "-n",
            "--count",
            min=1,
            help="Rows; default: all. Needed where an environment draws prompts "
            "without end.",
        ),
    ] = None,
    seed: Annotated[int, Option(help="Of rows that are drawn.")] = 0,
    examples: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="Add a column `completion` to tune on: an episode as it should be in "
            "this share of the rows; in others the answer without the calls of a tool, "
            "or a wrong sum.",
        ),
    ] = None,
) -> None:
    """Write an environment's prompts, with their answers, as rows of a file: to look at
    them, or for `maxlm tune`. Settings are the environment's, as kind=addition
    num_digits=3.

    maxlm rl prompts sums.jsonl kind=addition -n 2000
    """
    from maxlm.config.load import load_config
    from maxlm.rl.prompts_file import EnvironmentSettings, write_prompts

    environment_settings = [f"environment.{setting}" for setting in settings or ()]
    config = load_config(EnvironmentSettings, None, environment_settings).value
    num_rows = write_prompts(
        config.environment, out, count, seed=seed, examples=examples
    )
    print(f"{num_rows:,} prompts in {out}")


def report(
    run: Annotated[Path, Argument(exists=True, help="The run's folder.")],
    out: Annotated[
        Path | None, Option(help="HTML file to write; default: RUN/report.html.")
    ] = None,
    samples: Annotated[
        int,
        Option(
            min=0, help="Samples of the highest reward, of the lowest, and the newest."
        ),
    ] = 20,
) -> None:
    """Write an HTML page of a run: rewards, lengths, KL, entropy, time by phase, and
    samples with their rewards. It may be running still.

    maxlm rl report runs/solver
    """
    from maxlm.rl.report import write_run_report

    page = out or run / "report.html"
    write_run_report(run, page, samples)
    print(f"written: {page}")


subcommands = {"prompts": prompts, "report": report}
