"""Tasks on text: rows of token stores, packed, of which every token may become a
target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.random import Generator
from pydantic import Field

from maxlm.data.batch_source import BatchSource
from maxlm.data.loader.batches import make_batches, make_one_pass_batches
from maxlm.models.architectures.mtp import AheadPredictions
from maxlm.parallel.cross_entropy import fused_cross_entropy_loss
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.task import (
    BoundModel,
    DeviceBatch,
    LossResult,
    SourceInputs,
    Task,
    TaskModels,
    encode_batch_items,
)

Row = dict[str, np.ndarray]
"""One row of a batch, each array without the batch's dimension."""
ENCODER_ARRAYS = ("input_tokens", "input_positions", "input_segment_ids")
"""A batch's arrays for an encoder beside a decoder."""


@dataclass(frozen=True)
class TransformedSource:
    """Another source's batches, each row changed by its own number: pure in (seed,
    step, row)."""

    source: BatchSource
    change: Callable[[Row, Generator], Row]
    seed: int

    @property
    def num_steps(self) -> int | None:
        return self.source.num_steps

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Row:
        batch = self.source.rows(step, row_numbers)
        rows = []
        for i, number in enumerate(row_numbers):
            row = {name: array[i] for name, array in batch.items()}
            rng = np.random.default_rng((self.seed, step, int(number)))
            rows.append(self.change(row, rng))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class TokenPredictionTask(Task):
    """A model that predicts tokens, each with a weight."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser; 1e-4 steadies long runs in bf16, 0 is plain
    cross-entropy."""

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        """Returns the cross-entropy of targets (next tokens, masked ones, or what a
        decoder writes for the input in ``ENCODER_ARRAYS``) and what layers add (balance
        of experts). A batch with arrays of the model's frontend has its vectors in
        place of its placeholders, which are no targets."""
        model = models.trained
        arrays = (batch["tokens"], batch["positions"], batch["segment_ids"])
        weights = batch["weights"]
        inputs = tuple(batch[name] for name in ENCODER_ARRAYS if name in batch)
        vectors = encode_batch_items(model, batch)
        if inputs:
            hidden, aux = model(*arrays, inputs=inputs)
        elif vectors is not None:
            # A place that a vector takes is nothing to predict.
            is_placeholder = batch["targets"] == model.config.frontend.placeholder_id
            weights = jnp.where(is_placeholder, 0, weights)
            hidden, aux = model(*arrays, vectors=vectors)
        else:
            hidden, aux = model(*arrays)
        loss, cross_entropy = fused_cross_entropy_loss(
            model.prepare_logits(hidden),
            batch["targets"],
            weights,
            z_loss=self.z_loss,
            chunk_tokens=self.chunk_tokens,
        )
        sums = {"tokens": weights.sum(), "cross_entropy": cross_entropy}
        ahead = model.predict_ahead(
            hidden, batch["positions"], batch["segment_ids"], batch["targets"], weights
        )
        if ahead is not None:
            mean_loss = self._compute_ahead_loss(model, ahead)
            loss += ahead.loss_weight * mean_loss
            sums["mtp_cross_entropy"] = mean_loss
            aux = aux.plus(ahead.aux)
        return loss + aux.loss, sums | aux.sums

    def _compute_ahead_loss(
        self, model: BoundModel, ahead: AheadPredictions
    ) -> jax.Array:
        """Returns the mean of the cross-entropies of ``model.mtp``'s modules, each
        summed over tokens."""
        losses = [
            fused_cross_entropy_loss(
                model.prepare_logits(module.hidden),
                module.targets,
                module.weights,
                chunk_tokens=self.chunk_tokens,
            )[0]
            for module in ahead.predictions
        ]
        return jnp.stack(losses).mean()


class TextTask(TokenPredictionTask):
    """A model of one sequence that predicts tokens of text."""

    def make_row_transform(
        self, inputs: SourceInputs
    ) -> Callable[[Row, Generator], Row] | None:
        """Returns the host's change of a row of text into the task's row, pure in the
        row and the random generator, which pickles; None: no change."""
        return None

    def batch_source(self, inputs: SourceInputs) -> BatchSource:
        source = make_batches(
            inputs.stores, inputs.mixing, inputs.loader, seed=inputs.seed
        )
        return self._transformed(source, inputs)

    def evaluation_sources(self, inputs: SourceInputs) -> Mapping[str, BatchSource]:
        """Reads each held-out store once, in order; the transform is the same each
        time."""
        loader = inputs.loader
        sources = {}
        for name, store in inputs.heldout.items():
            source = make_one_pass_batches(store, loader.seq_len, loader.batch_size)
            sources[name] = self._transformed(source, inputs)
        return sources

    def _transformed(self, source: BatchSource, inputs: SourceInputs) -> BatchSource:
        change = self.make_row_transform(inputs)
        if change is None:
            return source
        return TransformedSource(source, change, inputs.seed)


class ClmTask(TextTask):
    """Causal language modelling: predicts every token from those before it in its
    document."""

    predicts_every_token: ClassVar[bool] = True

    kind: Literal["clm"] = "clm"
