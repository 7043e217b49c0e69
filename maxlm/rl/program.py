"""``maxlm rl``: trains a policy on what it generates, on a recipe of configs/rl."""

from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.run.config import RunConfig
from maxlm.run.huggingface_sources import convert_sources
from maxlm.train.program import TrainingResult, train_model
from maxlm.train.resume import Say


def train_policy(
    config: RunConfig,
    *,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    say: Say = print,
) -> TrainingResult:
    """Trains a recipe's policy.

    A Hugging Face checkpoint that it starts from, or whose model its task reads, is
    first made a run in ``FOLDER/NAME/base`` and so on, which later starts find there.

    Args:
        resume, profile, say: see :func:`~maxlm.train.program.train_model`.

    Raises:
        MaxlmError: a task that learns of no rollouts, prompts that are not there, or
            what ``train_model`` refuses.
    """
    if config.task.command != "rl":
        command = config.task.command
        message = f"task.kind={config.task.kind} learns of data, and not of rollouts"
        fix = f"run it with maxlm {command}, or use task.kind=grpo"
        raise MaxlmError(message, where="task.kind", fix=fix)
    # Before a checkpoint is converted, which takes minutes.
    if isinstance(config.task, PolicyTask):
        _check_prompt_files(config.task)
    return train_model(convert_sources(config), resume=resume, profile=profile, say=say)


def _check_prompt_files(task: PolicyTask) -> None:
    """Checks that the files that prompts come from are named and there."""
    task.environment.check_files("task.environment.files", "--prompts FILE")
    if task.validation is not None:
        setting = "task.validation.environment.files"
        task.validation.environment.check_files(setting, f"{setting}=[FILE]")
