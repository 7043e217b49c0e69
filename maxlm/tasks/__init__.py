"""Tasks: what a model is trained for, each a config with its batches, its loss and its
checks.

To add one, write a :class:`Task` in a file or folder here and name it in ``TASKS``, or
register it from outside: ``TASKS.register("kind")`` decorates its class, and an
installed package names its class in an entry point of the group ``maxlm.tasks``.
"""

from typing import Annotated

from maxlm.config import MaxlmError
from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.architectures import ModelConfig
from maxlm.tasks.task import SourceInputs, Task, TaskModels, Vocabulary
from maxlm.tasks.text import ClmTask

TASKS = Registry[type[Task]](
    "task",
    {
        "clm": "maxlm.tasks.text:ClmTask",
        "mlm": "maxlm.tasks.mlm:MlmTask",
        "span_corruption": "maxlm.tasks.denoising:SpanCorruptionTask",
        "ul2": "maxlm.tasks.denoising:Ul2Task",
        "sft": "maxlm.tasks.sft:SftTask",
        "reward": "maxlm.tasks.reward:RewardTask",
        "dpo": "maxlm.tasks.preference:DpoTask",
        "kto": "maxlm.tasks.kto:KtoTask",
        "orpo": "maxlm.tasks.preference:OrpoTask",
        "cpo": "maxlm.tasks.preference:CpoTask",
        "distill": "maxlm.tasks.distillation:DistillationTask",
        "distill_text": "maxlm.tasks.distillation:TextDistillationTask",
    },
)
TaskConfig = Annotated[Task, RegisteredConfig(TASKS, Task, default="clm")]


def list_task_kinds(architecture: str) -> list[str]:
    """Returns the kinds of known tasks that train models of an architecture."""
    return [kind for kind, task in TASKS.items() if task.architecture == architecture]


def check_task(
    task: Task, model: ModelConfig, seq_len: int, num_virtual_tokens: int = 0
) -> None:
    """Checks that a task can train a model on rows of ``seq_len`` tokens of text, or of
    examples that begin with ``num_virtual_tokens``; raises MaxlmError naming the
    settings."""
    if model.transformer_type != task.architecture:
        raise MaxlmError(
            f"task.kind={task.kind} trains a model of architecture "
            f"{task.architecture}, "
            f"model.architecture={model.architecture}",
            fix=f"use task.kind={' or '.join(list_task_kinds(model.transformer_type))}",
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
    if num_virtual_tokens and (task.reads_text or model.transformer_type != "decoder"):
        what = f"task.kind={task.kind} has no examples that begin with virtual tokens"
        fix = "use a task on examples for a decoder, or another adapter"
        raise MaxlmError(what, where="adapter", fix=fix)
    if num_virtual_tokens and (frozen := [*task.frozen_models()]):
        what = f"virtual tokens, which the {frozen[0]} of task.kind={task.kind} does not know"
        raise MaxlmError(
            what, where="adapter", fix="use another adapter, such as kind=lora"
        )


__all__ = [
    "TASKS",
    "ClmTask",
    "SourceInputs",
    "Task",
    "TaskConfig",
    "TaskModels",
    "Vocabulary",
    "check_task",
    "list_task_kinds",
]
