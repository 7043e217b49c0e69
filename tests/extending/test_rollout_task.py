"""REINFORCE (Williams 1992) with a mean baseline, as a package outside maxlm would add
it: a task that learns of what the model generates."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from maxlm.config.sampling import SamplingConfig
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.inference.engine_config import EngineConfig
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.rl.environments import EnvironmentConfig
from maxlm.rl.environments.addition import AdditionEnvironment
from maxlm.rl.rewards import RewardConfig
from maxlm.rl.rewards.exact_match import ExactMatchReward
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.packing import RowLayout
from maxlm.rl.rollouts.source import PolicyRolloutSource
from maxlm.sharding import MeshConfig
from maxlm.tasks import TASKS, SourceInputs, Task, TaskModels
from maxlm.tasks.task import Average


@TASKS.register("test_reinforce")
class ReinforceTask(Task):
    """Learn what is rewarded more than the other samples of the prompt."""

    reads_text = False
    command: ClassVar[Literal["train", "tune", "rl"]] = "rl"

    kind: Literal["test_reinforce"] = "test_reinforce"
    environment: EnvironmentConfig = AdditionEnvironment(num_digits=1)
    rewards: tuple[RewardConfig, ...] = (ExactMatchReward(),)
    rollouts: RolloutConfig = RolloutConfig(sampling=SamplingConfig(max_new_tokens=3))
    engine: EngineConfig = EngineConfig()
    generation_mesh: MeshConfig | None = None
    num_samples: int = 4
    epochs: int = 1
    minibatches: int = 1
    reads_models_of_rollouts: ClassVar[bool] = False

    def make_layout(self, seq_len: int) -> RowLayout:
        return RowLayout(seq_len)

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        numbers = BatchArraySpec.of_tokens(seq_len, np.float32)
        versions = BatchArraySpec.of_tokens(seq_len)
        return arrays | {
            "sampled_log_probs": numbers,
            "advantages": numbers,
            "versions": versions,
        }

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        return PolicyRolloutSource(self, inputs)

    def prepare_rollouts(self, models: TaskModels, batch: Any, key: jax.Array) -> Any:
        return {}

    def finish_rollouts(
        self, scores: np.ndarray, weights: Sequence[float], batch: Any
    ) -> Any:
        totals = scores @ np.array(weights)
        advantages = (totals - totals.mean(axis=1, keepdims=True)).reshape(-1, 1)
        return batch | {
            "advantages": (advantages * batch["weights"]).astype(np.float32)
        }

    def loss(self, models: TaskModels, batch: Any, key: jax.Array) -> Any:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden, _ = models.trained(*inputs)
        log_probs = compute_fused_log_probs(
            models.trained.prepare_logits(hidden), batch["targets"]
        )
        weights = batch["weights"]
        difference = abs(log_probs - batch["sampled_log_probs"]) * weights
        sums = {
            "tokens": weights.sum(),
            "log_prob_difference": Average(difference.sum(), weights.sum()),
        }
        return -(log_probs * batch["advantages"]).sum(), sums
