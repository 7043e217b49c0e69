"""Preference tasks: learn which answers are better than others.

The two answers of a pair stand in one row, the chosen one in an odd and the rejected
one in an even segment, so that one pass reads both. Formulas and their normalisation
are those of TRL 1.16.

    PreferenceTask         log-probabilities of whole answers (this file)
    ├── ReferenceTask      beside a frozen model (reference.py)
    │   ├── DpoTask        dpo.py
    │   └── KtoTask        kto.py
    ├── ReferenceFreeTask  beside a cross-entropy (reference_free.py)
    │   ├── CpoTask
    │   └── OrpoTask
    └── RewardTask         reward.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.models.aux import Aux
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.tasks.rows import RowTask, sum_by_segment
from maxlm.tasks.task import BoundModel, DeviceBatch

PairLosses = tuple[jax.Array, jax.Array]
"""Losses of pairs [..., E], finite for padding too, and rewards of both answers [...,
E, 2]."""


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of the sequences of examples [..., E], each of n sequences."""

    per_token: jax.Array
    """Log-probability of every target, fp32 [..., S], in nats."""
    sums: jax.Array
    """Sums over each sequence's weighted targets, fp32 [..., E, n], in nats."""
    lengths: jax.Array
    """Numbers of weighted targets, fp32 [..., E, n]; 0 where an example is padding."""
    aux: Aux

    @property
    def means(self) -> jax.Array:
        """Mean log-probabilities of a weighted target, [..., E, n], in nats."""
        return self.sums / jnp.maximum(self.lengths, 1)

    @property
    def is_present(self) -> jax.Array:
        """Whether an example is there, and no padding, bool [..., E]."""
        return self.lengths[..., 0] > 0


class PreferenceTask(RowTask):
    """A task on the log-probabilities of whole answers."""

    examples_per_row: int = Field(default=1, ge=1)
    """Most examples that share a row, each with attention to itself alone."""

    def compute_sequence_log_probs(
        self, model: BoundModel, batch: DeviceBatch, prefix: str = ""
    ) -> SequenceLogProbs:
        """Runs a model once over rows [..., S], the arrays whose names begin with
        ``prefix``."""
        segment_ids = batch[f"{prefix}segment_ids"]
        hidden, aux = model(
            batch[f"{prefix}tokens"], batch[f"{prefix}positions"], segment_ids
        )
        per_token = compute_fused_log_probs(
            model.prepare_logits(hidden),
            batch[f"{prefix}targets"],
            chunk_tokens=self.chunk_tokens,
        )
        weights = batch[f"{prefix}weights"]

        def sum_by_sequence(values: jax.Array) -> jax.Array:
            sums = sum_by_segment(values, segment_ids, self.num_segments)
            return sums.reshape(*sums.shape[:-1], -1, self.sequences_per_example)

        return SequenceLogProbs(
            per_token=per_token,
            sums=sum_by_sequence(per_token * weights),
            lengths=sum_by_sequence(weights),
            aux=aux,
        )


def compute_margin_losses(
    scores: jax.Array,
    loss_type: str,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
) -> jax.Array:
    """Computes losses [..., E] of how much better the chosen answer scores.

    Args:
        scores: of both answers, chosen and rejected, [..., E, 2].
        loss_type: sigmoid, simpo, robust, hinge or ipo.
        beta: scale of the rewards.
        label_smoothing: probability that a label is wrong.
        target_margin: by how much the scores are to differ, times ``beta``.
    """
    margins = scores[..., 0] - scores[..., 1]
    if loss_type == "ipo":
        # (h − 1 / 2τ)² with β as τ (Azar et al. 2023, arXiv 2310.12036).
        return jnp.square(margins - 1 / (2 * beta))
    margins = beta * margins - target_margin
    if loss_type == "hinge":
        return jax.nn.relu(1 - margins)

    def compute_loss(sign: int) -> jax.Array:
        return -jax.nn.log_sigmoid(sign * margins)

    # As if the label is right, and as if it is wrong.
    right = compute_loss(1)
    wrong = compute_loss(-1)
    if loss_type == "robust":
        # Unbiased under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409).
        smoothed = (1 - label_smoothing) * right - label_smoothing * wrong
        return smoothed / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def check_label_smoothing(label_smoothing: float, loss_type: str) -> None:
    """Raises MaxlmError where a loss has no use for labels that may be wrong."""
    if label_smoothing and loss_type in ("hinge", "ipo"):
        message = f"label_smoothing={label_smoothing} with loss_type={loss_type}"
        fix = "set it to 0, or use another loss"
        raise MaxlmError(message, where="label_smoothing", fix=fix)


def sum_answer_losses(
    answers: SequenceLogProbs, pair_losses: PairLosses, batch: DeviceBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums the losses of pairs of ``answers``, and what is logged of them; see
    :func:`sum_pairs`."""
    losses, rewards = pair_losses
    total, sums = sum_pairs(losses, rewards, answers.is_present, answers.aux, batch)
    sums["chosen_log_prob"] = answers.means[..., 0].sum()
    return total, sums


def sum_pairs(
    losses: jax.Array,
    rewards: jax.Array,
    is_present: jax.Array,
    aux: Aux,
    batch: DeviceBatch,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums pairs' losses [..., E], and what is logged of both answers' rewards [..., E,
    2]; ``tokens`` counts the pairs."""
    chosen = jnp.where(is_present, rewards[..., 0], 0)
    rejected = jnp.where(is_present, rewards[..., 1], 0)
    sums = {
        "tokens": is_present.sum(dtype=jnp.float32),
        "accuracy": (chosen > rejected).sum(dtype=jnp.float32),
        "margin": (chosen - rejected).sum(),
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
    }
    total = jnp.where(is_present, losses, 0).sum()
    return total + scale_layers_loss(aux, batch, sums["tokens"]), sums | aux.sums


def scale_layers_loss(
    aux: Aux, batch: DeviceBatch, examples: jax.Array
) -> jax.Array | float:
    """Returns what layers add to a loss summed over examples: theirs is summed over
    tokens."""
    tokens = (batch["segment_ids"] > 0).sum(dtype=jnp.float32)
    if not aux.sums:  # layers add nothing
        return aux.loss
    return aux.loss * (examples / jnp.maximum(tokens, 1))
