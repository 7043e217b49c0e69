"""``maxlm tune``: trains a model that is there on a recipe of configs/tune."""

from math import ceil
from pathlib import Path
from typing import cast

from maxlm.config import MaxlmError
from maxlm.data.rows import RowSource
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.optim.schedule import make_schedule
from maxlm.run.config import RunConfig
from maxlm.run.huggingface_sources import convert_sources
from maxlm.run.prepare import make_source_inputs
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
