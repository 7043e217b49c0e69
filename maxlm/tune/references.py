"""Preference tasks beside training: a reference's log-probabilities, computed once, and
scores of a reward model."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.models.params import Params, bind, select_base_params
from maxlm.run.config import RunConfig
from maxlm.run.prepare import (
    check_frozen_tokenizers,
    make_source_inputs,
    prepare_tokenizer,
)
from maxlm.run.reward_model import RewardModel
from maxlm.run.setup import open_evaluation_batches, set_up_run
from maxlm.run.warm_start import init_or_warm_start_state, load_frozen_models
from maxlm.runtime.json_types import JsonMapping
from maxlm.sharding import MeshConfig, bind_mesh
from maxlm.tasks import TaskModels
from maxlm.tasks.reference import LOG_PROBS, ReferenceTask
from maxlm.tasks.task import DeviceBatch


def precompute_reference_log_probs(config: RunConfig, folder: str | Path) -> None:
    """Computes what a run's reference model says of its rows, in the order of its
    files, and writes it into ``folder``, for ``task.reference_log_probs``; NaN where
    the task leaves a row out. Raises MaxlmError: a task without a reference, or what is
    wrong with the run."""
    if not isinstance(config.task, ReferenceTask):
        message = f"task.kind={config.task.kind} has no reference model"
        raise MaxlmError(message, where="task.kind", fix="leave the computation out")
    task = config.task.model_copy(
        update={"reference_log_probs": None, "examples_per_row": 1}
    )
    config = config.model_copy(update={"task": task})
    setup = set_up_run(config)
    tokenizer = load_tokenizer(prepare_tokenizer(config, Path(folder)))
    check_frozen_tokenizers(config, tokenizer)
    inputs = make_source_inputs(config, tokenizer)
    model = setup.task_models["reference"].model
    if "reference" in setup.frozen_sources:
        params = load_frozen_models(setup)["reference"]
    else:
        params = select_base_params(init_or_warm_start_state(setup).params)

    def compute(params: Params, batch: DeviceBatch) -> jax.Array:
        models = TaskModels(None, {"reference": bind(model, params)})
        # Nothing random happens without gradients: the key has no effect.
        key = jax.random.key(0)
        return ReferenceTask.prepare_batch(task, models, batch, key)[LOG_PROBS]

    run = bind_mesh(setup.mesh, jax.jit(compute))
    for name in ("files", "validation_files"):
        if not getattr(task, name):
            continue
        file = task.open_files(name)
        source = task.make_source(
            file, np.arange(len(file)), inputs, shuffle=False, endless=False
        )
        log_probs = np.full((len(file), task.num_reference_columns), np.nan, np.float32)
        batch_values = []
        with open_evaluation_batches(setup, source) as batches:
            for device_batch in batches:
                values = run(params, device_batch)
                batch_values.append(process_allgather(values, tiled=True))
        # The last batch is filled up: what is behind the examples is nobody's.
        example_indices = source.example_indices
        rows = np.concatenate(batch_values).reshape(-1, task.num_reference_columns)
        log_probs[example_indices] = rows[: len(example_indices)]
        if jax.process_index() == 0:
            np.save(Path(folder, f"{name}.npy"), log_probs)
    sync_global_devices(str(folder))  # the others read it next


def score_texts(
    folder: str | Path,
    rows: Sequence[JsonMapping],
    *,
    mesh: MeshConfig | None = None,
) -> np.ndarray:
    """Scores answers with a run's reward model. ``rows``: prompts and completions, or
    messages. Returns fp32 [len(rows)]; a higher score is a better answer."""
    model = RewardModel(folder, mesh=mesh)
    return model.score_tokens([model.encode_row(row) for row in rows])
