"""Preference tasks: learn from pairs of answers, of which one is better.

A pair stands in one row, its chosen answer in an odd and its rejected one in an even
segment, so that one pass reads both. Formulas and their normalisation are those of TRL
1.16.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.conversations import EncodedSequence, encode_pair
from maxlm.data.row_files import RowFiles
from maxlm.data.tokenizer import Tokenizer
from maxlm.models.aux import Aux
from maxlm.parallel.cross_entropy import compute_fused_log_probs
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.rows import (
    Arrays,
    ExampleEncoder,
    FileRow,
    FilesSetting,
    RowTask,
    sum_by_segment,
)
from maxlm.tasks.task import (
    BoundModel,
    DeviceBatch,
    LossResult,
    TaskModels,
    map_micro_batches,
)

LOG_PROBS = "reference_log_probs"
MISMATCHED = "mismatched_completion"
_FIX = "compute it anew with precompute_reference_log_probs"

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


@dataclass(frozen=True)
class ExtendedRows(RowFiles):
    """Rows of files with more columns, pure in a row's number."""

    log_probs: Path | None = None
    """File of an array [rows, columns]."""
    with_mismatched: bool = False
    """Whether a row has the completion of the row before it too; the first, that of the
    last."""

    def __getitem__(self, index: int, /) -> JsonObject:
        row = super().__getitem__(index)
        if self.log_probs is not None:
            row = row | {LOG_PROBS: _open_array(self.log_probs)[index]}
        if self.with_mismatched:
            previous_index = (index - 1) % len(self)
            row = row | {MISMATCHED: self._read_completion(previous_index)}
        return row

    def _read_completion(self, index: int) -> object:
        """Returns a row's completion; None where it has none, or cannot be read, which
        is reported when that row is read itself."""
        try:
            return super().__getitem__(index).get("completion")
        except MaxlmError:
            return None


@lru_cache(maxsize=8)
def _open_array(path: Path) -> NDArray[np.float32]:
    """Reads a .npy file, once; raises MaxlmError if it is none."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"cannot be read: {error}"
        raise MaxlmError(message, where=str(path), fix=_FIX) from error


class ReferenceTask(PreferenceTask):
    """A preference task that measures against a frozen model."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    prepares_batch_alone: ClassVar[bool] = True
    num_reference_columns: ClassVar[int] = 2
    """Log-probabilities of the reference that an example needs."""

    reference: LocalPath | None = None
    """Run whose model is the reference; null: the model that training starts from."""
    reference_log_probs: LocalPath | None = None
    """Folder of the reference's log-probabilities, which
    `precompute_reference_log_probs` writes (`files.npy` [rows, sequences],
    `validation_files.npy`): no second model is held then."""

    def frozen_models(self) -> Mapping[str, str | None]:
        if self.reference_log_probs is not None:
            return {}
        return {"reference": self.reference}

    def for_small_model(self) -> Self:
        return super().for_small_model().model_copy(update={LOG_PROBS: None})

    def compute_reference_log_probs(
        self, model: BoundModel, batch: DeviceBatch
    ) -> jax.Array:
        """Computes what the reference says of rows [..., S]: fp32 [..., E, columns]."""
        return self.compute_sequence_log_probs(model, batch).sums

    def prepare_batch(self, models: TaskModels, batch: DeviceBatch) -> DeviceBatch:
        if LOG_PROBS in batch:
            return batch
        reference = models.frozen["reference"]
        log_probs = map_micro_batches(
            self.compute_reference_log_probs, reference, batch
        )
        return batch | {LOG_PROBS: log_probs}

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().example_shapes()
        if self.reference_log_probs is None:
            return shapes
        return shapes | {LOG_PROBS: (self.num_reference_columns,)}

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        if self.reference_log_probs is None:
            return arrays
        if np.isnan(row[LOG_PROBS]).any():
            raise MaxlmError(
                "no reference log-probability for this row", where=LOG_PROBS, fix=_FIX
            )
        return arrays | {LOG_PROBS: row[LOG_PROBS]}

    def open_files(self, setting: FilesSetting) -> RowFiles:
        file = super().open_files(setting)
        if self.reference_log_probs is None:
            return file
        path = Path(self.reference_log_probs, f"{setting}.npy")
        _open_array.cache_clear()  # it may have been written anew
        shape = _open_array(path).shape
        required = (len(file), self.num_reference_columns)
        if shape != required:
            message = f"an array {[*shape]}, where the files and the task need "
            message += f"{[*required]}"
            raise MaxlmError(message, where=str(path), fix=_FIX)
        return ExtendedRows(file.paths, file.starts, file.columns, log_probs=path)


class PairTask(PreferenceTask):
    """A task on prompts with a chosen and a rejected answer."""

    sequences_per_example = 2

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        return list(encode_pair(tokenizer, row))


class LogProbPairTask(PairTask):
    """A task on the log-probabilities of both answers."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

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
        losses, rewards = self.compute_pair_losses(answers, batch)
        total, sums = sum_pairs(losses, rewards, answers.is_present, answers.aux, batch)
        sums["chosen_log_prob"] = answers.means[..., 0].sum()
        reference = batch.get(LOG_PROBS)
        if reference is not None:
            ratios = answers.sums - reference
            ratios_per_token = ratios / jnp.maximum(answers.lengths, 1)
            sums["kl"] = ratios_per_token.mean(-1).sum()
        return total, sums


class MarginPairTask(LogProbPairTask):
    """A task whose loss reads how much better the chosen answer scores."""

    loss_type: str
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards: 0.1 to 0.5, and 2 to 10 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong. sigmoid and simpo mix the losses of both
    labels (conservative DPO), robust corrects for it."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            message = f"label_smoothing={self.label_smoothing} with "
            message += f"loss_type={self.loss_type}"
            fix = "set it to 0, or use another loss"
            raise MaxlmError(message, where="label_smoothing", fix=fix)
        return self

    def compute_margin_losses(
        self, scores: jax.Array, target_margin: float = 0.0
    ) -> jax.Array:
        """Computes losses [..., E] from the scores [..., E, 2] of both answers.

        Args:
            target_margin: by how much they are to differ, times ``beta``.
        """
        margins = scores[..., 0] - scores[..., 1]
        smoothing = self.label_smoothing
        if self.loss_type == "ipo":
            # (h − 1 / 2τ)² with β as τ (Azar et al. 2023, arXiv 2310.12036).
            return jnp.square(margins - 1 / (2 * self.beta))
        margins = self.beta * margins - target_margin
        if self.loss_type == "hinge":
            return jax.nn.relu(1 - margins)

        def compute_loss(sign: int) -> jax.Array:
            return -jax.nn.log_sigmoid(sign * margins)

        # As if the label is right, and as if it is wrong.
        right = compute_loss(1)
        wrong = compute_loss(-1)
        if self.loss_type == "robust":
            # Unbiased under flipped labels (Chowdhury et al. 2024, arXiv 2403.00409).
            return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        return (1 - smoothing) * right + smoothing * wrong


class DpoTask(ReferenceTask, MarginPairTask):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) and its
    kin: rewards are log-ratios to a reference model. ``kl`` is the mean log-ratio per
    token of both answers."""

    kind: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid", "hinge", "robust", "ipo"] = "sigmoid"
    """sigmoid; hinge (SLiC, arXiv 2305.10425); robust: unbiased where labels are
    flipped with probability `label_smoothing` (arXiv 2403.00409); ipo (arXiv
    2310.12036), per token."""

    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        ratios = answers.sums - batch[LOG_PROBS]
        scores = ratios
        if self.loss_type == "ipo":
            scores = ratios / jnp.maximum(answers.lengths, 1)
        return self.compute_margin_losses(scores), self.beta * ratios


class ReferenceFreePairTask(LogProbPairTask):
    """Pairs without a reference: the cross-entropy of the chosen answers, a mean over
    the tokens of the whole batch, keeps the model near them."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    learns_prompts: ClassVar[bool] = False
    """Whether the cross-entropy is over prompts too."""

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

    def prepare_batch(self, models: TaskModels, batch: DeviceBatch) -> DeviceBatch:
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


class CpoTask(ReferenceFreePairTask, MarginPairTask):
    """Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417) and SimPO
    (Meng et al. 2024, arXiv 2405.14734): rewards are log-probabilities, per token for
    ipo and simpo."""

    kind: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    gamma: float = Field(default=0.5, ge=0)
    """Margin by which simpo wants the chosen answer's reward above the other's."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of chosen answers; 0 for SimPO as published."""

    def compute_pair_losses(
        self, answers: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        is_per_token = self.loss_type in ("ipo", "simpo")
        scores = answers.means if is_per_token else answers.sums
        target_margin = self.gamma if self.loss_type == "simpo" else 0.0
        losses = self.compute_margin_losses(scores, target_margin)
        losses = losses + self.alpha * self.compute_nll(answers, batch)
        return losses, self.beta * scores


class OrpoTask(ReferenceFreePairTask):
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


def sum_pairs(
    losses: jax.Array,
    rewards: jax.Array,
    is_present: jax.Array,
    aux: Aux,
    batch: DeviceBatch,
) -> LossResult:
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
