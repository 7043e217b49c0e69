"""What a task says of its rollouts, and does with them."""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from maxlm.data.batch_source import Batch
from maxlm.inference.engine_config import EngineConfig
from maxlm.rl.environments.environment import Environment
from maxlm.rl.rewards.reward import Reward
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.packing import RowLayout
from maxlm.rl.rollouts.validation import ValidationConfig
from maxlm.sharding import MeshConfig
from maxlm.tasks.task import DeviceBatch, TaskModels


class RolloutTask(Protocol):
    """A task whose batches are made of rollouts."""

    @property
    def environment(self) -> Environment: ...

    @property
    def rewards(self) -> Sequence[Reward]: ...

    @property
    def rollouts(self) -> RolloutConfig: ...

    @property
    def validation(self) -> ValidationConfig | None: ...

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def generation_mesh(self) -> MeshConfig | None: ...

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        ...

    @property
    def epochs(self) -> int:
        """Times that a rollout is trained on."""
        ...

    @property
    def minibatches(self) -> int:
        """Steps of an epoch, each on its share of the rollout."""
        ...

    def make_layout(self, seq_len: int) -> RowLayout:
        """Returns how samples lie in rows of ``data.seq_len``."""
        ...

    @property
    def reads_models_of_rollouts(self) -> bool:
        """Whether :meth:`prepare_rollouts` has anything to compute."""
        ...

    def prepare_rollouts(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        """Returns arrays [M, B, ...] that a rollout's batch is to have beside those it
        has, of what models say of it; by the parameters that it was drawn with."""
        ...

    def find_groups_without_variance(
        self,
        scores: NDArray[np.float64],
        lengths: NDArray[np.integer],
        is_complete: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Says of each prompt whether its samples all score the same, so that
        comparing them says nothing.

        Args:
            scores: of each reward, [prompts, samples, rewards]; NaN: it gave none.
            lengths: tokens that the policy drew, [prompts, samples].
            is_complete: whether the policy ended a sample itself, [prompts, samples].
        """
        ...

    def finish_rollouts(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        is_complete: NDArray[np.bool_],
        batch: Batch,
    ) -> Batch:
        """Returns a rollout's arrays [rows, ...] to train on, on the host. The log of
        samples has the means of ``advantages`` [rows, S], if there are any.

        Args:
            scores: of each reward, [prompts, samples, rewards]; NaN: it gave none.
            weights: of the rewards.
            is_complete: whether the policy ended a sample itself, [prompts, samples].
            batch: the packed samples, with what :meth:`prepare_rollouts` added.
        """
        ...
