"""``maxlm tune``: trains a model that is there on a recipe of configs/tune."""

from math import ceil
from pathlib import Path
from typing import cast

import jax
from jax.experimental import multihost_utils

from maxlm.config import MaxlmError
from maxlm.data.rows import RowSource
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.optim.schedule import make_schedule
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.prepare import make_source_inputs
from maxlm.runtime.progress import show_progress
from maxlm.train.program import TrainingResult, train_model
from maxlm.train.resume import Say
from maxlm.tune.references import precompute_reference_log_probs
from maxlm.tune.vocabulary import grow_vocabulary


def tune_model(
    config: RunConfig,
    *,
    epochs: float | None = None,
    precompute_reference: bool = False,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
    say: Say = print,
) -> TrainingResult:
    """Trains a recipe's model.

    A Hugging Face checkpoint that it starts from, or whose model its task reads, is
    first made a run in ``FOLDER/NAME/base``, ``FOLDER/NAME/teacher`` and so on, which
    later starts find there. Special tokens that its tokenizer lacks are added to a copy
    of it, in ``FOLDER/NAME/grown``.

    Args:
        epochs: times that every row is read, in place of ``train.steps``, a tenth of
            which may be warm-up.
        precompute_reference: compute the reference's log-probabilities first, into
            ``FOLDER/NAME/reference``, so that training holds no second model.
        resume, profile, say: see :func:`~maxlm.train.program.train_model`.
    """
    if epochs is None:
        # An impossible schedule is refused before anything is written.
        make_schedule(config.schedule, config.train.steps)
    config = grow_vocabulary(convert_sources(config))
    if epochs is not None:
        steps = count_steps(config, epochs)
        warmup_steps = min(config.schedule.warmup_steps, steps // 10)
        train = config.train.model_copy(update={"steps": steps})
        schedule = config.schedule.model_copy(update={"warmup_steps": warmup_steps})
        config = config.model_copy(update={"train": train, "schedule": schedule})
    if precompute_reference:
        log_probs_folder = Path(config.folder, config.name, "reference")
        if not (log_probs_folder / "files.npy").exists():
            precompute_reference_log_probs(config, log_probs_folder)
        task = config.task.model_copy(
            update={"reference_log_probs": str(log_probs_folder)}
        )
        config = config.model_copy(update={"task": task})
    return train_model(config, resume=resume, profile=profile, say=say)


def count_steps(config: RunConfig, epochs: float) -> int:
    """Counts the steps in which a run reads its task's rows so many times."""
    start = config.train.start_from
    folder = config.tokenizer.path or (start and Path(start, "tokenizer"))
    if config.task.reads_text or folder is None:
        message = "--epochs counts rows of files, with the base's tokenizer"
        raise MaxlmError(message, where="--epochs", fix="set train.steps")
    inputs = make_source_inputs(config, load_tokenizer(folder))
    # Tasks that read no text make their batches of rows.
    source = cast(RowSource, config.task.batch_source(inputs))
    num_rows = source.rows_per_epoch * epochs
    return max(1, ceil(num_rows / config.data.batch_size))


def convert_sources(config: RunConfig) -> RunConfig:
    """Returns the config with runs in place of the Hugging Face checkpoints that it
    names, each made where that is not done yet."""
    home = Path(config.folder, config.name)
    start = config.train.start_from
    if start is not None and _is_huggingface(start):
        base = _convert_once(start, home / "base")
        train = config.train.model_copy(update={"start_from": base})
        config = config.model_copy(update={"train": train})
    task_changes = {}
    for name, source in config.task.frozen_models().items():
        if source is not None and _is_huggingface(source):
            path = _convert_once(source, home / name)
            # The settings of the task that name this model, whatever they are called.
            for setting, value in config.task:
                if value == source:
                    task_changes[setting] = path
    task = config.task.model_copy(update=task_changes)
    return config.model_copy(update={"task": task})


def _convert_once(source: str, target: Path) -> str:
    """Makes a run of a Hugging Face checkpoint, unless it is there; returns its
    folder."""
    if jax.process_index() == 0 and not (target / "config.yaml").exists():
        with show_progress() as progress:

            def show_reading(_: str, done: int, total: int) -> None:
                progress(f"reading {source}", done, total)

            convert(source, target, progress=show_reading)
    multihost_utils.sync_global_devices(str(target))  # the others read it next
    return str(target)


def _is_huggingface(folder: str) -> bool:
    path = Path(folder).expanduser()
    return (path / "config.json").exists() and not (path / "config.yaml").exists()
