"""Group relative policy optimization and its kin."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Batch
from maxlm.rl.advantages import ScoreMerge, ScoreScale, compute_group_advantages
from maxlm.rl.corrections import mask_off_policy_sequences
from maxlm.rl.losses import (
    ClipLimits,
    KlEstimator,
    LossType,
    PolicyLosses,
    RatioLevel,
    SapoTemperatures,
    VespoShape,
    compute_cispo_losses,
    compute_clipped_losses,
    compute_log_ratios,
    compute_sapo_losses,
    compute_vespo_losses,
    correct_kl_bias,
    estimate_kl,
    sum_token_losses,
)
from maxlm.rl.tasks.policy import (
    ADVANTAGES,
    REFERENCE,
    SAMPLED,
    ReferencePolicyTask,
    TokenStatistics,
)
from maxlm.tasks.task import Average, DeviceBatch, LossResult, TaskModels


class GrpoTask(ReferencePolicyTask):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300): a sample
    is as good as its score is above those of the prompt's other samples. Loss types and
    their averages are those of TRL 1.16; GSPO is ``ratio_level=sequence``."""

    compares_samples: ClassVar[bool] = True

    kind: Literal["grpo"] = "grpo"
    loss_type: LossType = "dapo"
    """grpo: mean over a sample's tokens, then over samples, which favours short right
    answers and long wrong ones; bnpo, dapo: mean over all tokens of the step (TRL's
    bnpo takes a device's); dr_grpo: sum over tokens divided by samples ·
    max_new_tokens; cispo: keeps the gradient of tokens whose ratio is capped; sapo: a
    smooth gate in place of a limit; luspo: sum over a sample's tokens, with
    ratio_level=sequence; vespo: weighs samples by their whole ratio."""
    ratio_level: RatioLevel = "token"
    """Ratios to the policy that a rollout's updates began with: of each token, or their
    geometric mean over a sample (GSPO, arXiv 2507.18071)."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """Ratios count as 1 − clip_low at least, where the advantage is negative."""
    clip_high: float = Field(default=0.2, ge=0)
    """Ratios count as 1 + clip_high at most, where the advantage is positive; 0.28 lets
    unlikely tokens grow (clip-higher, DAPO, arXiv 2503.14476, §3.1)."""
    clip_delta: float | None = Field(default=None, gt=1)
    """Most that a ratio counts where the advantage is negative (two-sided clipping,
    arXiv 2505.07291, §3.4); null: as much as it is."""
    cispo_max_ratio: float = Field(default=5.0, gt=0)
    """Cap of cispo's ratios (ScaleRL, arXiv 2510.13786)."""
    sapo_temperature_positive: float = Field(default=1.0, gt=0)
    """Of sapo's gate where the advantage is positive."""
    sapo_temperature_negative: float = Field(default=1.05, gt=0)
    """Of sapo's gate elsewhere."""
    vespo_k_positive: float = Field(default=2.0, ge=0)
    """Power of vespo's weighting where the advantage is positive."""
    vespo_lambda_positive: float = Field(default=3.0, gt=0)
    """Decay of it there."""
    vespo_k_negative: float = Field(default=3.0, ge=0)
    """Power of it elsewhere."""
    vespo_lambda_negative: float = Field(default=2.0, gt=0)
    """Decay of it elsewhere."""
    kl_estimator: KlEstimator = "k3"
    """How the divergence from the reference is estimated; see
    :func:`maxlm.rl.losses.estimate_kl` for the gradients."""
    kl_bias_correction: bool = True
    """Whether the estimate is weighed by the ratio, so that its gradient is the
    divergence's own (DeepSeek-V3.2, arXiv 2512.02556; TRL since 1.16); false: as in the
    GRPO paper, older TRL and tunix."""
    off_policy_threshold: float | None = Field(default=None, gt=0)
    """Samples with a negative advantage that the policy has moved away from by more
    nats a token teach nothing (DeepSeek-V3.2, §3.1); null: all do."""
    scale_scores: ScoreScale = "group"
    """What a score, less its group's mean, is divided by: the standard deviation of its
    ``group`` or of the ``batch``, the group's ``mean`` (MaxRL, arXiv 2602.02710), or
    nothing, ``none`` (Dr. GRPO)."""
    merge_scores: ScoreMerge = "sum_then_normalize"
    """Several rewards: added up first, or each normalised first (GDPO, arXiv
    2601.05242)."""
    deviation_ddof: Literal[0, 1] = 1
    """The standard deviation divides by the number of samples less this: 1 as in TRL
    and verl."""
    deviation_epsilon: float = Field(default=1e-4, ge=0)
    """Added to what scores are divided by: 1e-4 TRL, 1e-6 verl and tunix, 1e-9
    OpenRLHF."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.merge_scores == "normalize_then_sum" and self.scale_scores != "group":
            message = "merge_scores=normalize_then_sum scales each reward by its group"
            fix = "set scale_scores=group, or merge_scores=sum_then_normalize"
            raise MaxlmError(message, where="task.scale_scores", fix=fix)
        if self.loss_type == "luspo" and self.ratio_level == "token":
            message = "loss_type=luspo is a loss of whole samples"
            fix = "set it to sequence"
            raise MaxlmError(message, where="task.ratio_level", fix=fix)
        return self

    def compute_advantages(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        penalties: NDArray[np.float64],
        batch: Batch,
    ) -> Batch:
        if penalties.any():
            # One reward more, for samples that have another.
            is_scored = ~np.isnan(scores).all(-1)
            shaping = np.where(is_scored, -penalties, np.nan)
            scores = np.concatenate([scores, shaping[..., None]], axis=-1)
            weights = [*weights, 1.0]
        advantages = compute_group_advantages(
            scores,
            scale=self.scale_scores,
            merge=self.merge_scores,
            weights=weights,
            ddof=self.deviation_ddof,
            epsilon=self.deviation_epsilon,
        )
        return {ADVANTAGES: self._spread_samples(advantages.ravel(), batch)}

    def compute_loss(
        self, statistics: TokenStatistics, models: TaskModels, batch: DeviceBatch
    ) -> LossResult:
        sequences = self.get_sequences(batch)
        log_probs = statistics.log_probs
        old_log_probs = self.get_old_log_probs(statistics, batch)
        correction = self.correct_samples(old_log_probs, batch)
        log_ratios = compute_log_ratios(
            log_probs, old_log_probs, sequences, self.ratio_level
        )
        advantages = batch[ADVANTAGES]
        match self.loss_type:
            case "cispo":
                policy_losses = compute_cispo_losses(
                    log_ratios, log_probs, advantages, self.cispo_max_ratio
                )
            case "sapo":
                temperatures = SapoTemperatures(
                    self.sapo_temperature_positive, self.sapo_temperature_negative
                )
                policy_losses = compute_sapo_losses(
                    log_ratios, advantages, temperatures
                )
            case "vespo":
                policy_losses = self._compute_vespo_losses(
                    log_probs, old_log_probs, correction.log_sums, batch
                )
            case _:
                limits = ClipLimits(self.clip_low, self.clip_high, self.clip_delta)
                policy_losses = compute_clipped_losses(log_ratios, advantages, limits)
        losses = policy_losses.per_token
        if self.off_policy_threshold is not None:
            losses = losses * mask_off_policy_sequences(
                log_probs,
                batch[SAMPLED],
                advantages,
                sequences,
                self.off_policy_threshold,
            )
        # vespo's weights have the correction in them.
        if self.loss_type != "vespo":
            losses = losses * correction.per_token
        metrics = self.measure_policy(statistics, old_log_probs, correction, batch)
        num_tokens = sequences.num_weighted
        if self.has_reference:
            kl = estimate_kl(log_probs, batch[REFERENCE], self.kl_estimator)
            if self.kl_bias_correction:
                kl = correct_kl_bias(kl, log_ratios)
            losses = losses + self.kl_coef * kl
            metrics["kl"] = Average(sequences.total(kl), num_tokens)
        if self.entropy_coef:
            losses = losses - self.entropy_coef * statistics.entropies
        clipped = policy_losses.is_clipped.astype(losses.dtype)
        metrics["clip_share"] = Average(sequences.total(clipped), num_tokens)
        total, divisor = sum_token_losses(
            losses, sequences, self.loss_type, self.max_new_tokens
        )
        return total, {"tokens": divisor, **metrics}

    def _compute_vespo_losses(
        self, log_probs, old_log_probs, log_correction_sums, batch: DeviceBatch
    ) -> PolicyLosses:
        shape = VespoShape(
            self.vespo_k_positive,
            self.vespo_lambda_positive,
            self.vespo_k_negative,
            self.vespo_lambda_negative,
        )
        return compute_vespo_losses(
            log_probs,
            old_log_probs,
            batch[ADVANTAGES],
            self.get_sequences(batch),
            shape,
            log_correction_sums,
        )
