"""A run's adapter merged into its base, as a run of its own: the way on for models that
no published family computes."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from maxlm.checkpoint.reading import read_metadata
from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.huggingface.checkpoint import (
    MergedCheckpointReader,
    RunCheckpointWriter,
    copy_param,
)
from maxlm.models.params import flatten_names, param_specs
from maxlm.run.convert import check_new_folder, make_new_folder, open_run_checkpoint
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.progress import Progress, ignore_progress
from maxlm.sharding import AxisRules


@dataclass(frozen=True)
class MergedRun:
    """A run that is written."""

    folder: Path
    num_params: int


def write_merged_run(
    source: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    progress: Progress = ignore_progress,
) -> MergedRun:
    """Writes a run with its adapter merged, in fp32, as a run of step 0 without one:
    config, checkpoint, tokenizer. A layer of a parameter is in memory at a time.

    Args:
        step: which checkpoint; None: the newest.

    Raises:
        MaxlmError: a folder that is no run, a run without an adapter or with one that
            cannot be merged, a target that has files.
    """
    source = Path(source)
    target = Path(target)
    check_new_folder(target)
    if not (source / "config.yaml").exists():
        message = "no run here (no config.yaml)"
        raise MaxlmError(message, where=str(source), fix="name a folder like runs/sft")
    config, reader = open_run_checkpoint(source, step)
    if config.adapter is None:
        message = "this run has no adapter"
        raise MaxlmError(message, where=str(source), fix="leave out --merge")
    specs = param_specs(config.model.build(rules=AxisRules(), dtype=jnp.float32))
    merged_reader = MergedCheckpointReader(reader, config.adapter, specs)
    # Where the run keeps an average of its parameters, that is what is merged.
    train = config.train.model_copy(
        update={"start_from": None, "trainable": None, "ema_decay": None}
    )
    merged_config = config.model_copy(
        update={
            "name": target.name,
            "folder": str(target.parent),
            "adapter": None,
            "train": train,
        }
    )
    metadata = read_metadata(reader.folder)
    merged_metadata: JsonObject = {
        "config": merged_config.model_dump(mode="json"),
        "tokenizer": metadata.get("tokenizer"),
    }
    if metadata.get("published") is not None:
        merged_metadata["published"] = metadata["published"]

    by_name = flatten_names(specs)
    num_params = sum(spec.size for spec in by_name.values())
    params_done = 0
    with make_new_folder(target) as folder:
        writer = RunCheckpointWriter(folder / "checkpoints")
        for name, spec in by_name.items():
            copy_param(merged_reader, writer, name, spec.num_layer_axes, folder)
            params_done += spec.size
            # Bytes of fp32.
            progress("merging", 4 * params_done, 4 * num_params)
        writer.commit(merged_metadata)
        if (source / "tokenizer").exists():
            shutil.copytree(source / "tokenizer", folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(merged_config))
    return MergedRun(target, num_params)
