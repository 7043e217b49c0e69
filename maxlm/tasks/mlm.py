"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2019, §3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.data.batch_source import Transform
from maxlm.tasks.corrupt import mask_tokens
from maxlm.tasks.task import SourceInputs
from maxlm.tasks.text import TextTask
from maxlm.tasks.vocabulary import Vocabulary

# Texts of published tokenizers' masks.
_MASKS = ("[MASK]", "<mask>")


class MlmTask(TextTask):
    """Some tokens from all others around them; needs an encoder."""

    architecture: ClassVar[str] = "encoder"

    kind: Literal["mlm"] = "mlm"
    share: float = Field(default=0.15, gt=0, lt=1)
    """Of a row's tokens, those to be named."""
    masked: float = Field(default=0.8, ge=0, le=1)
    """Of these, the part that becomes the mask ..."""
    random: float = Field(default=0.1, ge=0, le=1)
    """... and that which becomes another token; the rest stays, so that a model cannot trust what
    it sees."""
    whole_words: bool = False
    """Choose words, not tokens: parts of a word tell the others too easily."""
    mask_id: int | None = Field(default=None, ge=0)
    """The mask's id; null: the last one of the model's table, which the tokenizer must leave free.
    BERT's is 103."""

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        return {"mask_id": self.mask_id}

    @property
    def num_free_ids(self) -> int:
        return int(self.mask_id is None)

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        mask = next((ids[text] for text in _MASKS if text in ids), None)
        return self if mask is None else self.model_copy(update={"mask_id": mask})

    def transform(self, inputs: SourceInputs) -> Transform:
        return TokenMasking(self, inputs.vocabulary, inputs.seed)

    @model_validator(mode="after")
    def _check_parts(self):
        if self.masked + self.random > 1:
            raise MaxlmError(
                f"masked={self.masked} and random={self.random} are more than all",
                fix="let them add up to at most 1",
            )
        return self


@dataclass(frozen=True)
class TokenMasking:
    """Masks a batch's rows, each by its own number: pure in (seed, step, row)."""

    task: MlmTask
    vocabulary: Vocabulary
    seed: int

    def __call__(
        self, batch: dict[str, np.ndarray], step: int, row_numbers: Sequence[int]
    ) -> dict[str, np.ndarray]:
        task, vocabulary = self.task, self.vocabulary
        mask = vocabulary.size - 1 if task.mask_id is None else task.mask_id
        out = dict(batch)
        for name in ("tokens", "targets", "weights"):
            out[name] = batch[name].copy()
        for i, row in enumerate(row_numbers):
            found = mask_tokens(
                batch["tokens"][i],
                batch["segment_ids"][i],
                np.random.default_rng((self.seed, step, int(row))),
                mask_id=mask,
                special=vocabulary.special,
                share=task.share,
                masked=task.masked,
                random=task.random,
                starts_word=vocabulary.starts_word if task.whole_words else None,
            )
            out["tokens"][i], out["targets"][i], out["weights"][i] = found
        return out
