"""On-policy distillation: a teacher judges the tokens that the student draws."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maxlm.config import LocalPath
from maxlm.data.batch_source import Batch
from maxlm.models.architectures import ModelConfig
from maxlm.parallel.divergence import fused_divergence_loss
from maxlm.rl.losses import ClipLimits, compute_clipped_losses
from maxlm.rl.tasks.policy import ADVANTAGES, OLD, PolicyTask, TokenStatistics
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.distillation import BETAS, check_same_vocabulary
from maxlm.tasks.extra_work import ExtraPass
from maxlm.tasks.task import (
    Average,
    BoundModel,
    DeviceBatch,
    LossResult,
    TaskModels,
)

_TEACHER = "teacher_log_probs"


class OnPolicyDistillationTask(PolicyTask):
    """A student learns a teacher's distributions on what it generates itself (Agarwal
    et al. 2024, arXiv 2306.13649), so that it learns to go on from its own mistakes.

    Metrics besides: ``teacher_kl``, the estimate mean log p(student) − log p(teacher)
    of the drawn tokens with signal=policy_gradient; ``divergence``, over the whole
    vocabulary, with signal=divergence. Both nats a token.
    """

    # The teacher is read in each step with signal=divergence.
    prepares_batch_alone: ClassVar[bool] = False
    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})
    needs_rewards: ClassVar[bool] = False

    kind: Literal["on_policy_distill"] = "on_policy_distill"
    num_samples: int = Field(default=1, ge=1)
    """Samples of each prompt; none is compared with others."""
    teacher: LocalPath
    """The teacher's run, such as `maxlm convert` makes, with the student's
    tokenizer."""
    signal: Literal["divergence", "policy_gradient"] = "divergence"
    """divergence: that of both distributions at each drawn token, over the whole
    vocabulary, the teacher running in each step; policy_gradient: the teacher's
    log-probability of the drawn token less the student's is its advantage (Lu et al.
    2025, "On-policy distillation"), the teacher running once a rollout: cheaper, and
    noisier."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """KL(student ‖ teacher), KL(teacher ‖ student), or the generalised Jensen–Shannon
    divergence: beta·KL(teacher ‖ mixture) + (1 − beta)·KL(student ‖ mixture)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of jsd's mixture."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits; the divergence counts times its square."""
    clip: float = Field(default=0.2, ge=0)
    """With policy_gradient, ratios count as 1 ± clip at most."""

    def frozen_models(self) -> Mapping[str, str | None]:
        return {"teacher": self.teacher}

    def check_frozen_models(
        self, model: ModelConfig, frozen: Mapping[str, ModelConfig]
    ) -> None:
        for teacher in frozen.values():
            check_same_vocabulary(
                teacher.vocab_size, model.vocab_size, str(self.teacher)
            )

    def extra_passes(self) -> tuple[ExtraPass, ...]:
        if self.signal == "divergence":
            # Each step's loss reads the teacher.
            return super().extra_passes()
        return self.make_passes([None, "teacher"])

    @property
    def reads_models_of_rollouts(self) -> bool:
        return self.signal == "policy_gradient" or super().reads_models_of_rollouts

    def prepare_rows(
        self, policy: BoundModel, models: TaskModels, batch: DeviceBatch
    ) -> DeviceBatch:
        if self.signal == "divergence":
            return super().prepare_rows(policy, models, batch)
        return {
            OLD: self.compute_policy_statistics(policy, batch).log_probs,
            _TEACHER: self.compute_statistics(
                models.frozen["teacher"], batch
            ).log_probs,
        }

    def compute_advantages(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        penalties: NDArray[np.float64],
        batch: Batch,
    ) -> Batch:
        if self.signal == "divergence":
            return {ADVANTAGES: np.zeros(batch["weights"].shape)}
        advantages = batch[_TEACHER].astype(np.float64) - batch[OLD]
        return {ADVANTAGES: np.where(batch["weights"] > 0, advantages, 0.0)}

    def compute_loss(
        self, statistics: TokenStatistics, models: TaskModels, batch: DeviceBatch
    ) -> LossResult:
        sequences = self.get_sequences(batch)
        num_tokens = sequences.num_weighted
        old_log_probs = self.get_old_log_probs(statistics, batch)
        correction = self.correct_samples(old_log_probs, batch)
        metrics = self.measure_policy(statistics, old_log_probs, correction, batch)
        if self.signal == "divergence":
            teacher = models.frozen["teacher"]
            inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
            teacher_hidden, _ = teacher(*inputs)
            total, divergence, _ = fused_divergence_loss(
                models.trained.prepare_logits(statistics.hidden),
                teacher.prepare_logits(teacher_hidden),
                batch["targets"],
                batch["weights"],
                beta=BETAS.get(self.divergence, self.beta),
                temperature=self.temperature,
                chunk_tokens=self.chunk_tokens,
            )
            metrics["divergence"] = Average(divergence, num_tokens)
        else:
            advantages = batch[ADVANTAGES]
            limits = ClipLimits(self.clip, self.clip)
            losses, is_clipped = compute_clipped_losses(
                statistics.log_probs - old_log_probs, advantages, limits
            )
            total = sequences.total(losses * correction.per_token)
            clipped = sequences.total(is_clipped.astype(losses.dtype))
            metrics["clip_share"] = Average(clipped, num_tokens)
            metrics["teacher_kl"] = Average(-sequences.total(advantages), num_tokens)
        if self.entropy_coef:
            total -= self.entropy_coef * sequences.total(statistics.entropies)
        return total, {"tokens": num_tokens, **metrics}
