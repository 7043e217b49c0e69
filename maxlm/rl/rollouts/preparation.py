"""What models say of a rollout before it is trained on."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from maxlm.data.batch_source import Batch
from maxlm.models.params import Params, bind, fold_in_name
from maxlm.optim.state import TrainState
from maxlm.optim.step import bind_frozen
from maxlm.rl.rollouts.task import RolloutTask
from maxlm.run.setup import BatchPlacement, RunSetup
from maxlm.sharding import bind_mesh
from maxlm.tasks.task import DeviceBatch, TaskModels


class RolloutPreparation:
    """Computes what :meth:`RolloutTask.prepare_rollouts` adds to a rollout, on the
    devices of the run."""

    def __init__(self, task: RolloutTask, setup: RunSetup):
        self._task = task
        self._setup = setup
        self._prepare = _jit_preparation(setup, task)

    def compute_arrays(
        self, batch: Batch, number: int, state: TrainState
    ) -> dict[str, np.ndarray]:
        """Returns arrays [rows, ...] on the host.

        Args:
            number: of the rollout.
        """
        placement = BatchPlacement.of_run(self._setup, self._task.minibatches)
        local_batch = {
            name: array[placement.local_rows] for name, array in batch.items()
        }
        added = self._prepare(state, placement.put(local_batch), np.uint32(number))
        arrays: dict[str, np.ndarray] = {}
        for name, array in added.items():
            value = np.asarray(process_allgather(array, tiled=True))
            value = value.reshape(-1, *value.shape[2:])
            if placement.token_order is not None:
                # In the sequence's own order, as rows are on the host.
                value = value[:, np.argsort(placement.token_order)]
            arrays[name] = value
        return arrays


def _jit_preparation(
    setup: RunSetup, task: RolloutTask
) -> Callable[[TrainState, DeviceBatch, np.uint32], DeviceBatch]:
    """Returns ``prepare(state, batch, rollout number)``: what models say of a rollout,
    compiled at its first call."""
    modules = setup.frozen_modules
    seed = setup.config.seed

    def prepare(
        params: Params,
        frozen: Mapping[str, Params],
        task_state: Mapping[str, jax.Array],
        batch: DeviceBatch,
        number: jax.Array,
    ) -> DeviceBatch:
        key = fold_in_name(jax.random.key(seed), "rollouts")
        models = TaskModels(
            bind(setup.model, params), bind_frozen(modules, frozen, params), task_state
        )
        return task.prepare_rollouts(models, batch, jax.random.fold_in(key, number))

    run = bind_mesh(setup.mesh, jax.jit(prepare))

    def prepare_state(
        state: TrainState, batch: DeviceBatch, number: np.uint32
    ) -> DeviceBatch:
        return run(state.params, state.frozen, state.task, batch, number)

    return prepare_state
