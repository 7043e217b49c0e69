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
from typing import Any, ClassVar, Literal, NamedTuple, Self

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
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow, RowTask, sum_by_segment
from maxlm.tasks.task import DeviceBatch, LossResult, TaskModels, map_micro_batches

LOG_PROBS, MISMATCHED = "reference_log_probs", "mismatched_completion"
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
        self, model: Any, batch: DeviceBatch, prefix: str = ""
    ) -> SequenceLogProbs:
        """Runs a model once over rows [..., S], the arrays whose names begin with
        ``prefix``."""
        arrays = (
            batch[prefix + name] for name in ("tokens", "positions", "segment_ids")
        )
        hidden, aux = model(*arrays)
        logits = model.prepare_logits(hidden)
        targets = batch[f"{prefix}targets"]
        own = compute_fused_log_probs(logits, targets, chunk_tokens=self.chunk_tokens)
        weights = batch[f"{prefix}weights"]

        def total(values: jax.Array) -> jax.Array:
            sums = sum_by_segment(
                values, batch[f"{prefix}segment_ids"], self.num_segments
            )
            return sums.reshape(*sums.shape[:-1], -1, self.sequences_per_example)

        return SequenceLogProbs(own, total(own * weights), total(weights), aux)


@dataclass(frozen=True)
class ExtendedRows(RowFiles):
    """Rows of files with more columns, pure in a row's number."""

    log_probs: Path | None = None
    """File of an array [rows, columns]."""
    with_mismatched: bool = False
    """Whether a row has the completion of the row before it too; the first, that of the
    last."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        row = super().__getitem__(index)
        if self.log_probs is not None:
            row = row | {LOG_PROBS: _open_array(self.log_probs)[index]}
        if self.with_mismatched:
            row = row | {MISMATCHED: self._read_completion((index - 1) % len(self))}
        return row

    def _read_completion(self, index: int) -> Any:
        """A row's completion; None where it has none, or cannot be read: its own turn
        says so."""
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
        raise MaxlmError(
            f"cannot be read: {error}", where=str(path), fix=_FIX
        ) from error


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
        return (
            {}
            if self.reference_log_probs is not None
            else {"reference": self.reference}
        )

    def for_small_model(self) -> Self:
        return super().for_small_model().model_copy(update={LOG_PROBS: None})

    def compute_reference_log_probs(self, model: Any, batch: DeviceBatch) -> jax.Array:
        """Computes what the reference says of rows [..., S]: fp32 [..., E, columns]."""
        return self.compute_sequence_log_probs(model, batch).sums

    def prepare_batch(self, models: TaskModels, batch: DeviceBatch) -> DeviceBatch:
        if LOG_PROBS in batch:
            return batch
        model = models.frozen["reference"]
        found = map_micro_batches(self.compute_reference_log_probs, model, batch)
        return batch | {LOG_PROBS: found}

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        own = {LOG_PROBS: (self.num_reference_columns,)}
        return super().example_shapes() | (
            {} if self.reference_log_probs is None else own
        )

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

    def open_files(self, which: Literal["files", "validation_files"]) -> RowFiles:
        file = super().open_files(which)
        if self.reference_log_probs is None:
            return file
        path = Path(self.reference_log_probs, f"{which}.npy")
        _open_array.cache_clear()  # it may have been written anew
        wanted = len(file), self.num_reference_columns
        shape = _open_array(path).shape
        if shape != wanted:
            what = f"an array {[*shape]}, where the files and the task need {[*wanted]}"
            raise MaxlmError(what, where=str(path), fix=_FIX)
        return ExtendedRows(**vars(file), log_probs=path)


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
        self, own: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        """Computes pairs' losses from the trained model's log-probabilities."""

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        own = self.compute_sequence_log_probs(models.trained, batch)
        losses, rewards = self.compute_pair_losses(own, batch)
        total, sums = sum_pairs(losses, rewards, own.is_present, own.aux, batch)
        sums["chosen_log_prob"] = own.means[..., 0].sum()
        reference = batch.get(LOG_PROBS)
        if reference is not None:
            sums["kl"] = (
                ((own.sums - reference) / jnp.maximum(own.lengths, 1)).mean(-1).sum()
            )
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
            what = f"label_smoothing={self.label_smoothing} with loss_type={self.loss_type}"
            raise MaxlmError(
                what, where="label_smoothing", fix="set it to 0, or use another loss"
            )
        return self

    def compute_margin_losses(
        self, scores: jax.Array, wanted: float = 0.0
    ) -> jax.Array:
        """Computes losses [..., E] from the scores [..., E, 2] of both answers;
        ``wanted``: by how much they are to differ, times ``beta``."""
        margins = scores[..., 0] - scores[..., 1]
        smoothing = self.label_smoothing
        if self.loss_type == "ipo":
            return jnp.square(margins - 1 / (2 * self.beta))
        margins = self.beta * margins - wanted
        if self.loss_type == "hinge":
            return jax.nn.relu(1 - margins)
        right, wrong = (-jax.nn.log_sigmoid(sign * margins) for sign in (1, -1))
        if self.loss_type == "robust":
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
        self, own: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        ratios = own.sums - batch[LOG_PROBS]
        scores = (
            ratios / jnp.maximum(own.lengths, 1) if self.loss_type == "ipo" else ratios
        )
        return self.compute_margin_losses(scores), self.beta * ratios


class ReferenceFreePairTask(LogProbPairTask):
    """Pairs without a reference: the cross-entropy of the chosen answers, a mean over
    the tokens of the whole batch, keeps the model near them."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    learns_prompts: ClassVar[bool] = False
    """Whether the cross-entropy is over prompts too."""

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        own = {"nll_weights": BatchArraySpec.of_tokens(seq_len, np.float32)}
        return super().batch_arrays(seq_len) | own

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        weights = arrays["weights"]
        if (
            self.learns_prompts
        ):  # from the first token on, which the last virtual one predicts
            weights = arrays["positions"] >= encoder.num_virtual_tokens - 1
        return arrays | {
            "nll_weights": ((arrays["segment_ids"] == 1) * weights).astype(np.float32)
        }

    def prepare_batch(self, models: TaskModels, batch: DeviceBatch) -> DeviceBatch:
        weights = batch["nll_weights"]
        pairs = ((batch["segment_ids"] % 2 == 1) & (batch["positions"] == 0)).sum(
            dtype=jnp.float32
        )
        return batch | {
            "nll_weights": weights * (pairs / jnp.maximum(weights.sum(), 1))
        }

    def compute_nll(self, own: SequenceLogProbs, batch: DeviceBatch) -> jax.Array:
        """Returns each pair's share of the cross-entropy, [..., E]."""
        nll = -own.per_token * batch["nll_weights"]
        return sum_by_segment(nll, batch["segment_ids"], self.num_segments)[..., ::2]


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
        self, own: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        scores = own.means if self.loss_type in ("ipo", "simpo") else own.sums
        wanted = self.gamma if self.loss_type == "simpo" else 0.0
        losses = self.compute_margin_losses(scores, wanted)
        return losses + self.alpha * self.compute_nll(own, batch), self.beta * scores


class OrpoTask(ReferenceFreePairTask):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): the
    cross-entropy of chosen answers, prompts included, and the odds of both answers, of
    probabilities per token."""

    learns_prompts: ClassVar[bool] = True

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio, the paper's λ."""

    def compute_pair_losses(
        self, own: SequenceLogProbs, batch: DeviceBatch
    ) -> PairLosses:
        scores = jnp.where(own.is_present[..., None], own.means, -1.0)
        # Clipped, so that gradients stay finite where a probability is near one.
        log_odds = scores - jax.nn.log1mexp(jnp.maximum(-scores, 1e-7))
        ratio = jax.nn.log_sigmoid(log_odds[..., 0] - log_odds[..., 1])
        return self.compute_nll(own, batch) - self.beta * ratio, self.beta * scores


def sum_pairs(
    losses: jax.Array,
    rewards: jax.Array,
    is_present: jax.Array,
    aux: Aux,
    batch: DeviceBatch,
) -> LossResult:
    """Sums pairs' losses [..., E], and what is logged of both answers' rewards [..., E,
    2]; ``tokens`` counts the pairs."""
    chosen, rejected = (jnp.where(is_present, rewards[..., i], 0) for i in (0, 1))
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
    """Returns what layers add to a loss summed over examples, not over tokens."""
    tokens = (batch["segment_ids"] > 0).sum(dtype=jnp.float32)
    return aux.loss * (examples / jnp.maximum(tokens, 1)) if aux.sums else aux.loss
