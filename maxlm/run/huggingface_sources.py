"""Hugging Face checkpoints and GGUF files that a run starts from or reads, made runs
once."""

from pathlib import Path

import jax
from jax.experimental import multihost_utils

from maxlm.huggingface.model_files import is_model_path
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.runtime.progress import show_progress


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
    return is_model_path(path) and not (path / "config.yaml").exists()
