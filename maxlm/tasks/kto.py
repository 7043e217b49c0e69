"""Kahneman-Tversky optimization: learns from answers that are good or bad, without
pairs."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.conversations import (
    EncodedSequence,
    encode_answer,
    get_column,
    get_label,
    read_template_variables,
)
from maxlm.data.row_files import RowFiles
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import scale_layers_loss
from maxlm.tasks.reference import (
    LOG_PROBS,
    MISMATCHED,
    ExtendedRows,
    ReferenceTask,
)
from maxlm.tasks.rows import (
    Arrays,
    ExampleEncoder,
    FileRow,
    FilesSetting,
    join_sequences,
)
from maxlm.tasks.task import (
    BoundModel,
    DeviceBatch,
    LossResult,
    TaskModels,
    map_micro_batches,
)

_MISMATCHED_PREFIX = "kl_"
"""Prefix of the arrays of a prompt with another row's completion."""


class KtoTask(ReferenceTask):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306) on rows
    of prompt, completion and label.

    The distance to the reference is measured on prompts with the completion of the row
    before them in the file: one number for the whole batch, its micro-batches together,
    no less than 0 and without a gradient.
    """

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers. Let the weights of both kinds times their numbers be 1 to
    4/3."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        prompt = get_column(row, "prompt")
        completion = get_column(row, "completion")
        variables = read_template_variables(row)
        return [encode_answer(tokenizer, prompt, completion, variables)]

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        """Adds the label, and the prompt with another row's completion, cut to what a
        row has room for."""
        tokenizer = encoder.tokenizer
        prompt = row["prompt"]
        variables = read_template_variables(row)
        try:
            encoded = encode_answer(tokenizer, prompt, row[MISMATCHED], variables)
        except MaxlmError:
            # The fault is of another row, and reported when that one is read.
            encoded = encode_answer(tokenizer, prompt, row["completion"], variables)
        length = encoder.max_length
        mismatched = EncodedSequence(
            encoded.tokens[:length], encoded.is_target[:length]
        )
        joined = join_sequences([mismatched], encoder.num_virtual_tokens)
        label_arrays: Arrays = {"labels": 1.0 if get_label(row) else -1.0}
        mismatched_arrays = {
            _MISMATCHED_PREFIX + name: array for name, array in joined.items()
        }
        extended = super().extend_example(encoder, row, arrays)
        return extended | label_arrays | mismatched_arrays

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().example_shapes() | {"labels": ()}

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        mismatched = {
            _MISMATCHED_PREFIX + name: array
            for name, array in arrays.items()
            if "seq" in array.axes
        }
        return arrays | mismatched

    def open_files(self, setting: FilesSetting) -> RowFiles:
        file = super().open_files(setting)
        if len(file) < 2:
            message = "one row, where each is compared with another's completion"
            raise MaxlmError(message, where=str(file.paths[0]), fix="give two or more")
        # A reference's stored log-probabilities are columns already.
        log_probs = file.log_probs if isinstance(file, ExtendedRows) else None
        return ExtendedRows(
            file.paths,
            file.starts,
            file.columns,
            log_probs=log_probs,
            with_mismatched=True,
        )

    def compute_reference_log_probs(
        self, model: BoundModel, batch: DeviceBatch
    ) -> jax.Array:
        matched = super().compute_reference_log_probs(model, batch)
        mismatched = self._compute_mismatched(model, batch)
        return jnp.concatenate([matched, mismatched], -1)

    def _compute_mismatched(self, model: BoundModel, batch: DeviceBatch) -> jax.Array:
        """Computes log-probabilities of the other rows' completions, [..., E, 1]."""
        return self.compute_sequence_log_probs(model, batch, _MISMATCHED_PREFIX).sums

    def prepare_batch(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        batch = super().prepare_batch(models, batch, key)
        is_present = batch["labels"] != 0  # [M, B, E]; padding has the label 0
        mismatched = map_micro_batches(self._compute_mismatched, models.trained, batch)
        # The reference's columns are of the matched completion and of the mismatched.
        ratios = mismatched[..., 0] - batch[LOG_PROBS][..., 1]
        ratios = jnp.where(is_present, ratios, 0)
        # The paper's reference point z0, of the whole batch.
        mean_ratio = ratios.sum() / jnp.maximum(is_present.sum(), 1)
        kl = jnp.maximum(mean_ratio, 0)
        return batch | {"kl": jnp.where(is_present, kl, 0)}

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        answers = self.compute_sequence_log_probs(models.trained, batch)
        labels = batch["labels"]  # [..., E]: 1, −1, or 0 of padding
        is_good = batch["labels"] > 0
        ratios = answers.sums[..., 0] - batch[LOG_PROBS][..., 0]
        # The paper's value function v; a label's sign makes one formula of its two.
        values = jax.nn.sigmoid(labels * self.beta * (ratios - batch["kl"]))
        weights = jnp.where(is_good, self.desirable_weight, self.undesirable_weight)
        losses = jnp.where(labels != 0, weights * (1 - values), 0)
        rewards = self.beta * ratios
        examples = (labels != 0).sum(dtype=jnp.float32)

        def average(values: jax.Array, chosen: jax.Array) -> jax.Array:
            """Returns a mean over some examples, as a sum over all: what is logged is
            divided by all."""
            share = examples / jnp.maximum(chosen.sum(dtype=jnp.float32), 1)
            return share * jnp.where(chosen, values, 0).sum()

        is_right = labels * (ratios - batch["kl"]) > 0
        accuracy = is_right.sum(dtype=jnp.float32)
        kl = batch["kl"].sum()
        chosen = average(rewards, is_good)
        rejected = average(rewards, labels < 0)
        sums = {
            "tokens": examples,  # what is logged is divided by their number
            "accuracy": accuracy,
            "kl": kl,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "chosen_log_prob": average(answers.means[..., 0], is_good),
        }
        total = losses.sum() + scale_layers_loss(answers.aux, batch, examples)
        return total, sums | answers.aux.sums
