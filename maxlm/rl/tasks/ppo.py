"""Proximal policy optimization with a value of every token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import Batch
from maxlm.models.aux import Aux
from maxlm.parallel.local import get_layout, make_spec
from maxlm.rl.advantages import estimate_advantages, sum_scores, whiten
from maxlm.rl.losses import (
    ClipLimits,
    adapt_kl_coef,
    compute_clipped_losses,
    compute_value_losses,
    estimate_kl,
)
from maxlm.rl.tasks.policy import (
    ADVANTAGES,
    OLD,
    REFERENCE,
    ReferencePolicyTask,
    TokenStatistics,
)
from maxlm.tasks.extra_work import ExtraPass
from maxlm.tasks.preference import scale_layers_loss
from maxlm.tasks.task import (
    AuxiliaryModel,
    Average,
    BoundModel,
    DeviceBatch,
    LossResult,
    TaskModels,
    TaskState,
)

VALUE = "value"
"""The head that the policy has in ``model.heads``."""
VALUES = "values"
RETURNS = "returns"
_KL_COEF = "kl_coef"
_KL_REWARDS = "kl_rewards"
"""Of each token, its part of the divergence from the reference as a reward."""


class PpoTask(ReferencePolicyTask):
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) on tokens
    as actions, as Ziegler et al. 2019 (arXiv 1909.08593) and TRL 1.12 do: a token's
    reward is −kl_coef times its part of the divergence from the reference, the last
    one's has the sample's score besides, and a value model says what is to be
    expected.

    Metrics besides: ``sequence_kl`` is nats a sample, ``kl_coef`` the weight where it
    adapts to that, ``value_loss`` half the squared error of values,
    ``value_clip_share`` the share of values whose gradient a limit takes away,
    ``value_mean`` and ``return_mean`` what is expected and what came, and ``old_kl``
    half the mean square of the policy's log-ratios since the rollout.
    """

    kind: Literal["ppo"] = "ppo"
    value_model: Literal["head", "separate"] = "head"
    """What says what is to be expected: ``head``: a head of the policy,
    ``model.heads.value``, on the policy's own layers; ``separate``: a model of its own,
    as large again with its gradients and the optimizer's state, whose loss moves none
    of the policy's layers; ``optimizer.clip_norm`` counts the gradients of both."""
    value_run: LocalPath | None = None
    """Run that a separate value model starts from, such as a reward model's; null: a
    copy of the model that training starts from, with a fresh head."""
    num_samples: int = Field(default=1, ge=1)
    """Samples of each prompt; none is compared with others."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of the divergence from the reference in the rewards, the first where it
    adapts; 0: no second model is held."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How a token's part of it is estimated; see
    :func:`maxlm.rl.losses.estimate_kl`."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats a sample that the weight adapts to (Ziegler et al. 2019, §2.2), such as 6;
    null: it stays."""
    kl_horizon: float = Field(default=10_000, gt=0)
    """Samples in which it adapts: larger is slower."""
    clip: float = Field(default=0.2, ge=0)
    """Ratios count as 1 ± clip at most."""
    value_clip: float | None = Field(default=0.2, ge=0)
    """Values move by so much in a rollout's updates; null: as they will."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the values' loss."""
    discount: float = Field(default=1.0, ge=0, le=1)
    """γ: what a reward one token later is worth."""
    decay: float = Field(default=0.95, ge=0, le=1)
    """λ of the generalised advantage estimate: 1 trusts what came, 0 the values."""
    whiten_rewards: bool = False
    """Whether rewards are scaled to a variance of 1 over the rollout."""
    whiten_advantages: bool = True
    """Whether advantages are scaled to a mean of 0 and a variance of 1 over it."""

    @model_validator(mode="after")
    def _check_value_model(self) -> Self:
        if self.value_run is not None and self.value_model == "head":
            message = "a head of the policy starts from no run"
            fix = "set task.value_model=separate, or value_run to null"
            raise MaxlmError(message, where="task.value_run", fix=fix)
        return self

    @property
    def required_heads(self) -> Mapping[str, int]:
        return {VALUE: 1} if self.value_model == "head" else {}

    def auxiliary_models(self) -> Mapping[str, AuxiliaryModel]:
        if self.value_model == "head":
            return {}
        return {VALUE: AuxiliaryModel({VALUE: 1}, self.value_run)}

    def for_small_model(self) -> Self:
        """Returns the task in small, with values that start as the policy does."""
        return super().for_small_model().model_copy(update={"value_run": None})

    def extra_passes(self) -> tuple[ExtraPass, ...]:
        passes = super().extra_passes()
        if self.value_model == "head":
            return passes
        (value_pass,) = self.make_passes([VALUE])
        value_pass = replace(value_pass, name="values", makes_logits=False)
        return (*passes, value_pass)

    # The weight of the divergence, where it adapts.

    def init_state(self) -> TaskState:
        if self.kl_target is None:
            return {}
        return {_KL_COEF: jnp.float32(self.kl_coef)}

    def update_state(
        self, state: Mapping[str, jax.Array], metrics: Mapping[str, jax.Array]
    ) -> TaskState:
        if self.kl_target is None or not self.has_reference:
            return dict(state)
        num_samples = metrics["batch_tokens"] / jnp.maximum(
            metrics["trained_length"], 1.0
        )
        # A sample is trained on once an epoch, and counts once.
        kl_coef = adapt_kl_coef(
            state[_KL_COEF],
            metrics["sequence_kl"],
            target=self.kl_target,
            horizon=self.kl_horizon,
            num_samples=num_samples / self.epochs,
        )
        return {_KL_COEF: kl_coef}

    # Rollouts.

    def list_prepared_arrays(self) -> list[str]:
        names = super().list_prepared_arrays()
        return [*names, VALUES, RETURNS]

    def compute_values(
        self, model: BoundModel, statistics: TokenStatistics, batch: DeviceBatch
    ) -> tuple[jax.Array, Aux]:
        """Returns what is expected before each target, fp32 [..., S], and what layers of
        a separate value model add to the loss."""
        hidden = statistics.hidden
        aux = Aux()
        if self.value_model == "separate":
            model = model.auxiliary[VALUE]
            hidden, aux = model(
                batch["tokens"], batch["positions"], batch["segment_ids"]
            )
        values = model.apply_head(VALUE, hidden)[..., 0]
        return reshard(values, make_spec(get_layout(batch["weights"]))), aux

    def prepare_rows(
        self, policy: BoundModel, models: TaskModels, batch: DeviceBatch
    ) -> DeviceBatch:
        statistics = self.compute_policy_statistics(policy, batch)
        values, _ = self.compute_values(policy, statistics, batch)
        arrays = {OLD: statistics.log_probs, VALUES: values}
        if self.has_reference:
            reference = self.compute_statistics(models.frozen["reference"], batch)
            kl = estimate_kl(
                statistics.log_probs, reference.log_probs, self.kl_estimator
            )
            kl_coef = models.state.get(_KL_COEF, self.kl_coef)
            arrays[REFERENCE] = reference.log_probs
            arrays[_KL_REWARDS] = -kl_coef * kl
        return arrays

    def compute_advantages(
        self,
        scores: NDArray[np.float64],
        weights: Sequence[float],
        penalties: NDArray[np.float64],
        batch: Batch,
    ) -> Batch:
        is_step = batch["weights"] > 0
        totals = sum_scores(scores, weights) - penalties
        is_scored = ~np.isnan(totals)
        totals = np.where(is_scored, totals, 0.0)
        # The score comes with the last token that the policy drew.
        segment_ids = batch["segment_ids"]
        places = np.where(is_step, np.arange(is_step.shape[1]), -1)
        is_last = np.zeros_like(is_step)
        for number in range(1, self.sequences_per_row + 1):
            own_places = np.where(segment_ids == number, places, -1)
            last = own_places.max(1)
            rows = np.flatnonzero(last >= 0)
            is_last[rows, last[rows]] = True
        spread = self._spread_samples(totals.ravel(), batch)
        rewards = np.where(is_last, spread, 0.0)
        if self.has_reference:
            kl_rewards = np.where(is_step, batch[_KL_REWARDS], 0.0)
            rewards = rewards + kl_rewards.astype(np.float64)
        if self.whiten_rewards:
            rewards = whiten(rewards, is_step, keep_mean=True)
        values = batch[VALUES].astype(np.float64)
        advantages = estimate_advantages(
            rewards,
            values,
            is_step,
            segment_ids,
            discount=self.discount,
            decay=self.decay,
        )
        returns = np.where(is_step, advantages + values, 0.0)
        # A sample without a score teaches nothing.
        is_counted = self._spread_samples(is_scored.ravel(), batch) > 0
        if self.whiten_advantages:
            advantages = whiten(advantages, is_counted)
        return {
            ADVANTAGES: advantages,
            RETURNS: returns,
            "weights": batch["weights"] * is_counted,
        }

    # A step's loss.

    def compute_loss(
        self, statistics: TokenStatistics, models: TaskModels, batch: DeviceBatch
    ) -> LossResult:
        values, aux = self.compute_values(models.trained, statistics, batch)
        total, sums = self.compute_loss_with_values(statistics, values, batch)
        num_tokens = sums["tokens"]
        assert not isinstance(num_tokens, Average)
        total += scale_layers_loss(aux, batch, num_tokens)
        return total, {**sums, **self._measure_kl_coef(models, batch)}

    def _measure_kl_coef(
        self, models: TaskModels, batch: DeviceBatch
    ) -> dict[str, Average]:
        """Returns the weight of the divergence as a metric, where it adapts."""
        if _KL_COEF not in models.state or not self.has_reference:
            return {}
        num_samples = self.get_sequences(batch).num_present
        return {_KL_COEF: Average(models.state[_KL_COEF] * num_samples, num_samples)}

    def compute_loss_with_values(
        self, statistics: TokenStatistics, values: jax.Array, batch: DeviceBatch
    ) -> LossResult:
        """Computes the loss from what the policy says and expects, [..., S]."""
        sequences = self.get_sequences(batch)
        old_log_probs = self.get_old_log_probs(statistics, batch)
        correction = self.correct_samples(old_log_probs, batch)
        limits = ClipLimits(self.clip, self.clip)
        policy_losses = compute_clipped_losses(
            statistics.log_probs - old_log_probs, batch[ADVANTAGES], limits
        )
        value_losses = compute_value_losses(
            values, batch[VALUES], batch[RETURNS], self.value_clip
        )
        losses = policy_losses.per_token * correction.per_token
        policy_loss = sequences.total(losses)
        value_loss = sequences.total(value_losses.per_token)
        total = policy_loss + self.value_coef * value_loss
        if self.entropy_coef:
            total -= self.entropy_coef * sequences.total(statistics.entropies)
        num_tokens = sequences.num_weighted
        log_ratios = statistics.log_probs - old_log_probs
        sums: dict[str, jax.Array | Average] = {
            "tokens": num_tokens,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_share": sequences.total(policy_losses.is_clipped.astype(jnp.float32)),
            "value_clip_share": sequences.total(
                value_losses.is_clipped.astype(jnp.float32)
            ),
            "value_mean": sequences.total(values),
            "return_mean": sequences.total(batch[RETURNS]),
            "old_kl": sequences.total(jnp.square(log_ratios) / 2),
        }
        if self.has_reference:
            kl = sequences.total(
                estimate_kl(old_log_probs, batch[REFERENCE], self.kl_estimator)
            )
            sums["kl"] = kl
            sums["sequence_kl"] = Average(kl, sequences.num_present)
        metrics = self.measure_policy(statistics, old_log_probs, correction, batch)
        return total, sums | metrics
