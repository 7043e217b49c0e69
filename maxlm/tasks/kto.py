"""Kahneman-Tversky optimization: learns from answers that are good or bad, without
pairs."""

from functools import partial
from typing import Any, ClassVar, Literal

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
from maxlm.data.tokenizer import Tokenizer
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import (
    LOG_PROBS,
    MISMATCHED,
    ExtendedRows,
    ReferenceTask,
    scale_layers_loss,
)
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow, join_sequences
from maxlm.tasks.task import DeviceBatch, LossResult, TaskModels, map_micro_batches

_KL = "kl_"


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
        prompt, completion = (
            get_column(row, name) for name in ("prompt", "completion")
        )
        return [
            encode_answer(tokenizer, prompt, completion, read_template_variables(row))
        ]

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        """Adds the label, and the prompt with another row's completion, cut to what a
        row has room for."""
        prompt = row["prompt"]
        length = encoder.max_length
        variables = read_template_variables(row)
        encode = partial(encode_answer, encoder.tokenizer, prompt, variables=variables)
        try:
            tokens, is_target = encode(row[MISMATCHED])
        except MaxlmError:  # it is told of that row when its own turn comes
            tokens, is_target = encode(row["completion"])
        other = EncodedSequence(tokens[:length], is_target[:length])
        joined = join_sequences([other], encoder.num_virtual_tokens)
        own = {"labels": 1.0 if get_label(row) else -1.0}
        own |= {_KL + name: array for name, array in joined.items()}
        return super().extend_example(encoder, row, arrays) | own

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().example_shapes() | {"labels": ()}

    def batch_arrays(self, seq_len: int) -> dict[str, BatchArraySpec]:
        arrays = super().batch_arrays(seq_len)
        return arrays | {
            _KL + name: own for name, own in arrays.items() if "seq" in own.axes
        }

    def open_files(self, which: Literal["files", "validation_files"]) -> RowFiles:
        file = super().open_files(which)
        if len(file) < 2:
            what = "one row, where each is compared with another's completion"
            raise MaxlmError(what, where=str(file.paths[0]), fix="give two or more")
        return ExtendedRows(**{**vars(file), "with_mismatched": True})

    def compute_reference_log_probs(self, model: Any, batch: DeviceBatch) -> jax.Array:
        own = super().compute_reference_log_probs(model, batch)
        return jnp.concatenate([own, self._compute_mismatched(model, batch)], -1)

    def _compute_mismatched(self, model: Any, batch: DeviceBatch) -> jax.Array:
        return self.compute_sequence_log_probs(model, batch, _KL).sums

    def prepare_batch(self, models: TaskModels, batch: DeviceBatch) -> DeviceBatch:
        batch, is_present = super().prepare_batch(models, batch), batch["labels"] != 0
        own = map_micro_batches(self._compute_mismatched, models.trained, batch)[..., 0]
        ratios = jnp.where(is_present, own - batch[LOG_PROBS][..., 1], 0)
        kl = jnp.maximum(ratios.sum() / jnp.maximum(is_present.sum(), 1), 0)
        return batch | {"kl": jnp.where(is_present, kl, 0)}

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        own = self.compute_sequence_log_probs(models.trained, batch)
        labels = batch["labels"]
        is_good = batch["labels"] > 0
        ratios = own.sums[..., 0] - batch[LOG_PROBS][..., 0]
        values = jax.nn.sigmoid(labels * self.beta * (ratios - batch["kl"]))
        weights = jnp.where(is_good, self.desirable_weight, self.undesirable_weight)
        losses = jnp.where(labels != 0, weights * (1 - values), 0)
        rewards = self.beta * ratios
        examples = (labels != 0).sum(dtype=jnp.float32)

        def average(values: jax.Array, chosen: jax.Array) -> jax.Array:
            """A mean over some examples, as a sum over all."""
            share = examples / jnp.maximum(chosen.sum(dtype=jnp.float32), 1)
            return share * jnp.where(chosen, values, 0).sum()

        sums = {
            "tokens": examples,
            "accuracy": (labels * (ratios - batch["kl"]) > 0).sum(dtype=jnp.float32),
            "kl": batch["kl"].sum(),
            "chosen_reward": (chosen := average(rewards, is_good)),
            "rejected_reward": (rejected := average(rewards, labels < 0)),
            "margin": chosen - rejected,
            "chosen_log_prob": average(own.means[..., 0], is_good),
        }
        return losses.sum() + scale_layers_loss(
            own.aux, batch, examples
        ), sums | own.aux.sums
