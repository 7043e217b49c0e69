"""Tasks: what a model is trained for, each a config with its batches, its loss and its
checks.

To add one, write a :class:`Task` in a file or folder here and add it to ``_TASKS``, or
register it from outside with :func:`register_task`. An installed package names its
class in an entry point of the group ``maxlm.tasks``, under the task's kind.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, WrapValidator

from maxlm.config import MaxlmError, add_default_tag
from maxlm.models.architectures import ModelConfig
from maxlm.tasks.denoising import SpanCorruptionTask, Ul2Task
from maxlm.tasks.distillation import DistillationTask, TextDistillationTask
from maxlm.tasks.kto import KtoTask
from maxlm.tasks.mlm import MlmTask
from maxlm.tasks.preference import CpoTask, DpoTask, OrpoTask
from maxlm.tasks.reward import RewardTask
from maxlm.tasks.sft import SftTask
from maxlm.tasks.task import SourceInputs, Task, TaskModels, Vocabulary
from maxlm.tasks.text import ClmTask

_Preference = RewardTask | DpoTask | KtoTask | OrpoTask | CpoTask
_Distillation = DistillationTask | TextDistillationTask
_Builtin = (
    ClmTask
    | MlmTask
    | SpanCorruptionTask
    | Ul2Task
    | SftTask
    | _Preference
    | _Distillation
)
_TASKS: dict[str, type[Task]] = {
    task.model_fields["kind"].default: task for task in _Builtin.__args__
}


def register_task(task: type[Task]) -> type[Task]:
    """Makes a task known by its kind; also as a decorator."""
    _TASKS[task.model_fields["kind"].default] = task
    return task


def find_task(kind: str) -> type[Task] | None:
    """Returns the task of a kind, from an installed package if need be; None if there
    is none."""
    if kind not in _TASKS:
        for entry in entry_points(group="maxlm.tasks", name=kind):
            register_task(entry.load())
    return _TASKS.get(kind)


def list_task_kinds(architecture: str) -> list[str]:
    """Returns the kinds of known tasks that train models of an architecture."""
    return [kind for kind, task in _TASKS.items() if task.architecture == architecture]


def check_task(
    task: Task, model: ModelConfig, seq_len: int, num_virtual_tokens: int = 0
) -> None:
    """Checks that a task can train a model on rows of ``seq_len`` tokens of text, or of
    examples that begin with ``num_virtual_tokens``; raises MaxlmError naming the
    settings."""
    if model.architecture != task.architecture:
        raise MaxlmError(
            f"task.kind={task.kind} trains a model of architecture "
            f"{task.architecture}, "
            f"model.architecture={model.architecture}",
            fix=f"use task.kind={' or '.join(list_task_kinds(model.architecture))}",
        )
    if missing := {
        n: w for n, w in task.required_heads.items() if model.heads.get(n) != w
    }:
        what = f"task.kind={task.kind} reads the heads {missing}, the model has {dict(model.heads)}"
        raise MaxlmError(what, where="model.heads", fix=f"set {missing} there")
    longest = max(task.row_lengths(seq_len))
    if longest > model.max_seq_len:
        rows = "" if longest == seq_len else f" (rows of {longest} with reserved ids)"
        what = f"data.seq_len={seq_len}{rows} is longer than model.max_seq_len={model.max_seq_len}"
        raise MaxlmError(what, fix="shorten the sequences, or raise the model's limit")
    task.check(seq_len, model.vocab_size)
    if num_virtual_tokens and (task.reads_text or model.architecture != "decoder"):
        what = f"task.kind={task.kind} has no examples that begin with virtual tokens"
        fix = "use a task on examples for a decoder, or another adapter"
        raise MaxlmError(what, where="adapter", fix=fix)
    if num_virtual_tokens and (frozen := [*task.frozen_models()]):
        what = f"virtual tokens, which the {frozen[0]} of task.kind={task.kind} does not know"
        raise MaxlmError(
            what, where="adapter", fix="use another adapter, such as kind=lora"
        )


def _validate_task(settings: Any, validate: Any) -> Task:
    if isinstance(settings, Task):
        return settings
    if isinstance(settings, Mapping) and isinstance(kind := settings.get("kind"), str):
        task = find_task(kind)
        if task is not None and task not in _Builtin.__args__:
            return task.model_validate(settings)
    return validate(settings)


TaskConfig = Annotated[
    SerializeAsAny[_Builtin],
    Field(discriminator="kind"),
    add_default_tag("kind", "clm"),
    WrapValidator(_validate_task),
]

__all__ = [
    "ClmTask",
    "SourceInputs",
    "Task",
    "TaskConfig",
    "TaskModels",
    "Vocabulary",
    "check_task",
    "find_task",
    "list_task_kinds",
    "register_task",
]
