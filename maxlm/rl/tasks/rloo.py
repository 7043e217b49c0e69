"""REINFORCE with a leave-one-out baseline."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Batch
from maxlm.rl.advantages import (
    compute_group_advantages,
    compute_leave_one_out_advantages,
    sum_scores,
)
from maxlm.rl.losses import ClipLimits, compute_sequence_clipped_losses
from maxlm.rl.tasks.policy import (
    ADVANTAGES,
    OLD,
    REFERENCE,
    ReferencePolicyTask,
    TokenStatistics,
)
from maxlm.tasks.task import Average, DeviceBatch, LossResult, TaskModels


class RlooTask(ReferencePolicyTask):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740),
    normalised as TRL 1.16 does: a sample is one action, its score is compared with the
    mean of the prompt's other samples, and the divergence from the reference, the sum
    of log-ratios of its tokens, is part of the score."""

    compares_samples: ClassVar[bool] = True

    kind: Literal["rloo"] = "rloo"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """Ratios of whole samples count as 1 − clip_low at least, where the advantage is
    negative."""
    clip_high: float = Field(default=0.2, ge=0)
    """Ratios count as 1 + clip_high at most, where the advantage is positive."""
    normalize_advantages: bool = False
    """Whether advantages are scaled to a mean of 0 and a standard deviation of 1 over
    the whole rollout."""
    deviation_epsilon: float = Field(default=1e-4, ge=0)
    """Added to that standard deviation."""

    @model_validator(mode="after")
    def _check_correction(self) -> Self:
        if self.correction.startswith("token"):
            message = f"correction={self.correction}, where a sample is one action"
            fix = "use sequence_truncate, sequence_mask or none"
            raise MaxlmError(message, where="task.correction", fix=fix)
        return self

    def list_prepared_arrays(self) -> list[str]:
        names = super().list_prepared_arrays()
        # The score has the divergence of the policy that drew the samples.
        return [OLD, *names] if self.has_reference and OLD not in names else names

    def compute_advantages(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        penalties: NDArray[np.float64],
        batch: Batch,
    ) -> Batch:
        totals = sum_scores(scores, weights) - penalties
        if self.has_reference:
            log_ratios = batch[OLD].astype(np.float64) - batch[REFERENCE]
            log_ratios = np.where(batch["weights"] > 0, log_ratios, 0.0)
            kl = self._sum_samples(log_ratios, batch).reshape(totals.shape)
            totals = totals - self.kl_coef * kl
        advantages = compute_leave_one_out_advantages(totals)
        if self.normalize_advantages:
            # As one group of all samples; those without a score stay without.
            is_scored = ~np.isnan(totals)
            flat = np.where(is_scored, advantages, np.nan).reshape(1, -1)
            advantages = compute_group_advantages(flat, epsilon=self.deviation_epsilon)
        return {ADVANTAGES: self._spread_samples(advantages.ravel(), batch)}

    def compute_loss(
        self, statistics: TokenStatistics, models: TaskModels, batch: DeviceBatch
    ) -> LossResult:
        sequences = self.get_sequences(batch)
        old_log_probs = self.get_old_log_probs(statistics, batch)
        correction = self.correct_samples(old_log_probs, batch)
        losses, is_clipped = compute_sequence_clipped_losses(
            statistics.log_probs,
            old_log_probs,
            sequences.mean(batch[ADVANTAGES]),
            sequences,
            ClipLimits(self.clip_low, self.clip_high),
        )
        # Each of a sample's tokens has its weight.
        losses = losses * sequences.mean(correction.per_token)
        metrics = self.measure_policy(statistics, old_log_probs, correction, batch)
        num_sequences = sequences.num_present
        clipped = is_clipped.sum(dtype=jnp.float32)
        metrics["clip_share"] = Average(clipped, num_sequences)
        if self.has_reference:
            kl = sequences.total(old_log_probs - batch[REFERENCE])
            metrics["kl"] = Average(kl, sequences.num_weighted)
        if self.entropy_coef:
            entropies = sequences.mean(statistics.entropies)
            losses = losses - self.entropy_coef * entropies
        return losses.sum(), {"tokens": num_sequences, **metrics}
