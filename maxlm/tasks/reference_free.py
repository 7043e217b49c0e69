"""Preference tasks without a reference: a cross-entropy of the chosen answers keeps the
model near them."""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.conversations import EncodedSequence, encode_pair
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import (
    PairLosses,
    PreferenceTask,
    SequenceLogProbs,
    check_label_smoothing,
    compute_margin_losses,
    sum_answer_losses,
)
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow, sum_by_segment
from maxlm.tasks.task import DeviceBatch, LossResult, TaskModels


class ReferenceFreeTask(PreferenceTask):
    """Pairs without a reference: the cross-entropy of the chosen answers, a mean over
    the tokens of the whole batch, keeps the model near them."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})
    sequences_per_example = 2
    learns_prompts: ClassVar[bool] = False
    """Whether the cross-entropy is over prompts too."""

    @abstractmethod
    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        """Computes pairs' losses from the trained model's log-probabilities of the
        answers."""

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        answers = self.compute_sequence_log_probs(models.trained, batch)
        pair_losses = self.compute_pair_losses(answers, batch)
        return sum_answer_losses(answers, pair_losses, batch)

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        return list(encode_pair(tokenizer, row))

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        nll_weights = BatchArraySpec.of_tokens(seq_len, np.float32)
        return super().batch_arrays(seq_len) | {"nll_weights": nll_weights}

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        weights = arrays["weights"]
        if self.learns_prompts:
            # From the first token on, which the last virtual one predicts.
            weights = arrays["positions"] >= encoder.num_virtual_tokens - 1
        is_chosen = arrays["segment_ids"] == 1
        return arrays | {"nll_weights": (is_chosen * weights).astype(np.float32)}

    def prepare_batch(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        # The loss is divided by the number of pairs: a mean over tokens of the whole
        # batch, its micro-batches together, is weighted by pairs over tokens.
        weights = batch["nll_weights"]
        is_chosen = batch["segment_ids"] % 2 == 1
        begins_pair = is_chosen & (batch["positions"] == 0)
        num_pairs = begins_pair.sum(dtype=jnp.float32)
        nll_weights = weights * (num_pairs / jnp.maximum(weights.sum(), 1))
        return batch | {"nll_weights": nll_weights}

    def compute_nll(self, answers: SequenceLogProbs, batch: DeviceBatch) -> jax.Array:
        """Returns each pair's share of the cross-entropy, [..., E]."""
        nll = -answers.per_token * batch["nll_weights"]
        by_segment = sum_by_segment(nll, batch["segment_ids"], self.num_segments)
        # Chosen answers are every other segment.
        return by_segment[..., ::2]


class CpoTask(ReferenceFreeTask):
    """Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417) and SimPO
    (Meng et al. 2024, arXiv 2405.14734): rewards are log-probabilities, per token for
    ipo and simpo."""

    kind: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards: 0.1 to 0.5, and 2 to 10 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong: sigmoid and simpo mix the losses of both
    labels."""
    gamma: float = Field(default=0.5, ge=0)
    """Margin by which simpo wants the chosen answer's reward above the other's."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of chosen answers; 0 for SimPO as published."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        check_label_smoothing(self.label_smoothing, self.loss_type)
        return self

    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        is_per_token = self.loss_type in ("ipo", "simpo")
        scores = answers.means if is_per_token else answers.sums
        target_margin = self.gamma if self.loss_type == "simpo" else 0.0
        losses = compute_margin_losses(
            scores,
            self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            target_margin=target_margin,
        )
        losses = losses + self.alpha * self.compute_nll(answers, batch)
        return losses, self.beta * scores


class OrpoTask(ReferenceFreeTask):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): the
    cross-entropy of chosen answers, prompts included, and the odds of both answers, of
    probabilities per token."""

    learns_prompts: ClassVar[bool] = True

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio, the paper's λ."""

    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        # Padding gets some probability, of which the odds are finite.
        scores = jnp.where(answers.is_present[..., None], answers.means, -1.0)
        # log(p / (1 − p)), the paper's equation 4. Clipped, so that gradients stay
        # finite where a probability is near one.
        log_odds = scores - jax.nn.log1mexp(jnp.maximum(-scores, 1e-7))
        log_ratio = jax.nn.log_sigmoid(log_odds[..., 0] - log_odds[..., 1])
        losses = self.compute_nll(answers, batch) - self.beta * log_ratio
        return losses, self.beta * scores
