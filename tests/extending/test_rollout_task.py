"""REINFORCE (Williams 1992) with a mean baseline, as a package outside maxlm would add
it: a task that learns of what the model generates, and a reward."""

import shutil
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.data.batch_source import BatchArraySpec, BatchSource
from maxlm.inference.engine_config import EngineConfig
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.rl.environments import EnvironmentConfig
from maxlm.rl.environments.addition import AdditionEnvironment
from maxlm.rl.program import train_policy
from maxlm.rl.rewards import REWARDS, RewardConfig
from maxlm.rl.rewards.reward import Reward, Worker
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.packing import RowLayout
from maxlm.rl.rollouts.source import PolicyRolloutSource
from maxlm.rl.samples import Sample
from maxlm.run.config import RunConfig
from maxlm.sharding import MeshConfig
from maxlm.tasks import TASKS, SourceInputs, Task, TaskModels
from maxlm.tasks.task import Average
from maxlm.train.program import TrainingResult
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

NUM_BYTES = 256


@REWARDS.register("test_low_bytes")
class LowBytesReward(Reward):
    """The share of bytes below 128, of which a new model writes as many as others."""

    kind: str = "test_low_bytes"

    @property
    def worker(self) -> Worker:
        return "caller"

    def score(self, sample: Sample) -> float:
        drawn = np.array(sample.tokens)[sample.is_sampled]
        return float(np.mean(drawn < NUM_BYTES // 2))


@TASKS.register("test_reinforce")
class ReinforceTask(Task):
    """Learn what is rewarded more than the other samples of the prompt."""

    reads_text = False
    command: ClassVar[Literal["train", "tune", "rl"]] = "rl"

    kind: Literal["test_reinforce"] = "test_reinforce"
    environment: EnvironmentConfig = AdditionEnvironment(num_digits=1)
    rewards: tuple[RewardConfig, ...] = (LowBytesReward(),)
    rollouts: RolloutConfig = RolloutConfig(sampling=SamplingConfig(max_new_tokens=3))
    engine: EngineConfig = EngineConfig()
    generation_mesh: MeshConfig | None = None
    num_samples: int = 4
    epochs: int = 1
    minibatches: int = 1
    validation: ClassVar[None] = None

    @property
    def reads_models_of_rollouts(self) -> bool:
        return False

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

    def find_groups_without_variance(
        self, scores: np.ndarray, lengths: np.ndarray, is_complete: np.ndarray
    ) -> np.ndarray:
        return (scores == scores[:, :1]).all((1, 2))

    def finish_rollouts(
        self,
        scores: np.ndarray,
        weights: Sequence[float],
        is_complete: np.ndarray,
        batch: Any,
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


@pytest.fixture
def make_config(tmp_path):
    """``make_config(name)``: a run of the task on sums of one digit."""
    text = tiny.write_text(tmp_path / "text")
    settings = tiny.settings(tmp_path, text)
    settings["model"] |= {"vocab_size": 264, "num_layers": 1, "max_seq_len": 12}
    settings["data"] |= {"heldout_fraction": 0, "seq_len": 12, "batch_size": 32}
    settings["schedule"]["learning_rate"] = 2e-2
    parts: dict[str, Any] = {
        "tokenizer": {"vocab_size": 257},
        "task": {"kind": "test_reinforce", "engine": {"max_sequences": 8}},
        "mesh": {"data": 4, "fsdp": 1, "tensor": 2},
        "train": {"steps": 9},
        "checkpoint": {"every_steps": 4},
        "reporting": {"tensorboard": False},
    }

    def make(name: str) -> RunConfig:
        return RunConfig.model_validate(settings | parts | {"name": name})

    return make


def train(config: RunConfig) -> TrainingResult:
    return train_policy(config, say=lambda _: None)


@pytest.mark.more
@pytest.mark.heavy
def test_a_policy_learns_and_resumes_bit_for_bit(make_config):
    whole = train(make_config("whole"))
    records = tiny.read_metrics(whole.folder)
    rewards = [record["reward"] for record in records]
    assert rewards[0] == pytest.approx(0.5, abs=0.15)
    assert rewards[-1] > 0.8
    # Engine and trainer are one model, also after updates.
    differences = [record["log_prob_difference"] for record in records]
    assert max(differences) < 1e-5

    # A run that was killed before its last checkpoint, and after its last rollout.
    other = shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(other / "checkpoints" / "9")
    (other / "rollouts" / "00000008.npz").unlink()
    cut = train(make_config("cut"))
    assert cut.start_step == 8
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, cut.state))
    assert tiny.read_metrics(other)[-1]["reward"] == rewards[-1]
