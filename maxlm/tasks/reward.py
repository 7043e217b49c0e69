"""Reward models: a score for an answer, learnt from pairs of which one is better."""

from collections.abc import Mapping
from numbers import Real
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.data.conversations import EncodedSequence, encode_pair
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import PreferenceTask, sum_pairs
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow, sum_by_segment
from maxlm.tasks.task import DeviceBatch, LossResult, TaskModels

SCORE = "score"
"""The head that a reward model has in ``model.heads``."""


class RewardTask(PreferenceTask):
    """Bradley-Terry: the chosen answer's score is to be above the rejected one's. A
    score is read at the last token, the one that ends the answer; a row's ``margin``,
    if it has one, is the least difference that is wanted."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})
    sequences_per_example = 2

    kind: Literal["reward"] = "reward"
    center_rewards: float = Field(default=0.0, ge=0)
    """Weight of the square of both scores' sum, which keeps them around 0 (arXiv
    2312.09244)."""

    @property
    def required_heads(self) -> Mapping[str, int]:
        return {SCORE: 1}

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"margins": ()}

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        # Rows have a sequence's last token as a target alone. The score is read at the
        # answer's last token, so that one more goes behind it.
        return [
            EncodedSequence([*answer.tokens, 0], [*answer.is_target, True])
            for answer in encode_pair(tokenizer, row)
        ]

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        margin = row.get("margin")
        if not isinstance(margin, Real | None):
            message = f"margin is {margin!r}"
            fix = "write a number, or leave it out"
            raise MaxlmError(message, where="margin", fix=fix)
        return arrays | {"margins": float(margin or 0)}

    def loss(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> LossResult:
        # E pairs a row, in 2·E segments.
        segment_ids = batch["segment_ids"]
        hidden, aux = models.trained(batch["tokens"], batch["positions"], segment_ids)
        # Of each segment, the score at its last token; 0 of padding.
        positions = batch["positions"][..., None]
        segment_numbers = jnp.arange(1, self.num_segments + 1)
        is_in_segment = segment_ids[..., None] == segment_numbers  # [..., S, 2·E]
        last_position = jnp.where(is_in_segment, positions, -1).max(-2, keepdims=True)
        is_last = is_in_segment & (positions == last_position)
        token_scores = models.trained.apply_head(SCORE, hidden)  # [..., S, 1]
        segment_scores = jnp.where(is_last, token_scores, 0).sum(-2)
        # Chosen and rejected, [..., E, 2].
        scores = segment_scores.reshape(*segment_scores.shape[:-1], -1, 2)
        lengths = sum_by_segment(batch["weights"], segment_ids, self.num_segments)
        # −log σ(chosen − rejected − margin) (Ouyang et al. 2022, arXiv 2203.02155,
        # equation 1; the margin as in Llama 2, arXiv 2307.09288, equation 2).
        losses = -jax.nn.log_sigmoid(scores[..., 0] - scores[..., 1] - batch["margins"])
        losses += self.center_rewards * jnp.square(scores.sum(-1))
        is_present = lengths[..., ::2] > 0
        return sum_pairs(losses, scores, is_present, aux, batch)
