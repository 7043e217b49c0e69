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
        "dpo": "maxlm.tasks.dpo:DpoTask",
        "kto": "maxlm.tasks.kto:KtoTask",
        "orpo": "maxlm.tasks.reference_free:OrpoTask",
        "cpo": "maxlm.tasks.reference_free:CpoTask",
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
        kinds = list_task_kinds(model.transformer_type)
        raise MaxlmError(
            f"task.kind={task.kind} trains a model of architecture "
            f"{task.architecture}, model.architecture={model.architecture}",
            fix=f"use task.kind={' or '.join(kinds)}",
        )
    missing_heads = {
        name: width
        for name, width in task.required_heads.items()
        if model.heads.get(name) != width
    }
    if missing_heads:
        message = f"task.kind={task.kind} reads the heads {missing_heads}, "
        message += f"the model has {dict(model.heads)}"
        fix = f"set {missing_heads} there"
        raise MaxlmError(message, where="model.heads", fix=fix)
    longest = max(task.row_lengths(seq_len))
    if longest > model.max_seq_len:
        rows = "" if longest == seq_len else f" (rows of {longest} with reserved ids)"
        message = f"data.seq_len={seq_len}{rows} is longer than "
        message += f"model.max_seq_len={model.max_seq_len}"
        fix = "shorten the sequences, or raise the model's limit"
        raise MaxlmError(message, fix=fix)
    task.check(seq_len, model.vocab_size)
    task.check_model(model)
    if num_virtual_tokens:
        _check_virtual_tokens(task, model)


def _check_virtual_tokens(task: Task, model: ModelConfig) -> None:
    """Checks that a task's examples can begin with an adapter's virtual tokens."""
    if task.reads_text or model.transformer_type != "decoder":
        message = (
            f"task.kind={task.kind} has no examples that begin with virtual tokens"
        )
        fix = "use a task on examples for a decoder, or another adapter"
        raise MaxlmError(message, where="adapter", fix=fix)
    frozen = list(task.frozen_models())
    if frozen:
        message = f"virtual tokens, which the {frozen[0]} of task.kind={task.kind} "
        message += "does not know"
        fix = "use another adapter, such as kind=lora"
        raise MaxlmError(message, where="adapter", fix=fix)


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
