"""Direct preference optimization: learns from pairs of answers beside a reference."""

from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from maxlm.data.conversations import EncodedSequence, encode_pair
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import (
    PairLosses,
    SequenceLogProbs,
    check_label_smoothing,
    compute_margin_losses,
    sum_answer_losses,
)
from maxlm.tasks.reference import LOG_PROBS, ReferenceTask
from maxlm.tasks.rows import FileRow
from maxlm.tasks.task import DeviceBatch, LossResult, TaskModels


class DpoTask(ReferenceTask):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) and its
    kin: rewards are log-ratios to a reference model. ``kl`` is the mean log-ratio per
    token of both answers."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})
    sequences_per_example = 2

    kind: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid", "hinge", "robust", "ipo"] = "sigmoid"
    """sigmoid; hinge (SLiC, arXiv 2305.10425); robust: unbiased where labels are
    flipped with probability `label_smoothing` (arXiv 2403.00409); ipo (arXiv
    2310.12036), per token."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards: 0.1 to 0.5."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong. sigmoid mixes the losses of both labels
    (conservative DPO), robust corrects for it."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        check_label_smoothing(self.label_smoothing, self.loss_type)
        return self

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        return list(encode_pair(tokenizer, row))

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        answers = self.compute_sequence_log_probs(models.trained, batch)
        pair_losses = self.compute_pair_losses(answers, batch)
        total, sums = sum_answer_losses(answers, pair_losses, batch)
        ratios = answers.sums - batch[LOG_PROBS]
        ratios_per_token = ratios / jnp.maximum(answers.lengths, 1)
        sums["kl"] = ratios_per_token.mean(-1).sum()
        return total, sums

    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        """Computes pairs' losses from the trained model's log-probabilities of the
        answers and the reference's."""
        ratios = answers.sums - batch[LOG_PROBS]
        scores = ratios
        if self.loss_type == "ipo":
            scores = ratios / jnp.maximum(answers.lengths, 1)
        losses = compute_margin_losses(
            scores,
            self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        return losses, self.beta * ratios
