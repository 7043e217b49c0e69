"""Masked language modelling: predict the tokens that were hidden (Devlin et al. 2019,
§3.1)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.tasks.task import SourceInputs, Vocabulary
from maxlm.tasks.text import Row, TextTask

# Texts of published tokenizers' masks.
_MASKS = ("[MASK]", "<mask>")


class MlmTask(TextTask):
    """Masked language modelling (Devlin et al. 2019, §3.1): predicts some tokens from
    all others around them; needs an encoder."""

    architecture: ClassVar[str] = "encoder"

    kind: Literal["mlm"] = "mlm"
    share: float = Field(default=0.15, gt=0, lt=1)
    """Share of a row's tokens that are chosen, to be predicted."""
    masked: float = Field(default=0.8, ge=0, le=1)
    """Share of the chosen tokens that become the mask."""
    random: float = Field(default=0.1, ge=0, le=1)
    """Share of the chosen tokens that become another token; the rest stays, so that a
    model cannot trust what it sees."""
    whole_words: bool = False
    """Choose words, not tokens: parts of a word tell the others too easily."""
    mask_id: int | None = Field(default=None, ge=0)
    """The mask's id; null: the last one of the model's table, which the tokenizer must
    leave free. BERT's is 103."""

    @property
    def reserved_ids(self) -> Mapping[str, int | None]:
        return {"mask_id": self.mask_id}

    @property
    def num_ids_to_reserve(self) -> int:
        return int(self.mask_id is None)

    def with_special_tokens(self, ids: Mapping[str, int]) -> Self:
        for text in _MASKS:
            if text in ids:
                return self.model_copy(update={"mask_id": ids[text]})
        return self

    def make_row_transform(
        self, inputs: SourceInputs
    ) -> Callable[[Row, Generator], Row]:
        return partial(self.mask_row, inputs.vocabulary)

    def mask_row(self, vocabulary: Vocabulary, row: Row, rng: Generator) -> Row:
        """Masks ``share`` of a row's tokens but special ones and padding, rounded and
        at least one.

        Words, where they are chosen, are so in random order, while they fit what is
        left of the share: it may stay short of it, by less than the shortest word left.
        Special tokens and segments' ends end words.

        Returns:
            The row with int32 [S] ``tokens``, ``targets`` (the token that a chosen
            place held; 0 elsewhere) and fp32 ``weights``, 1 where a place was chosen.
        """
        tokens = row["tokens"]
        segment_ids = row["segment_ids"]
        is_special = vocabulary.is_special
        is_candidate = (segment_ids != 0) & ~is_special[tokens]
        places = np.flatnonzero(is_candidate)
        budget = 0
        if places.size:
            budget = max(1, round(self.share * places.size))
        if self.whole_words:
            begins_word = vocabulary.starts_word[tokens] | ~is_candidate
            begins_word[1:] |= segment_ids[1:] != segment_ids[:-1]
            word_numbers = np.cumsum(begins_word)[places]
            is_chosen = _choose_whole_words(word_numbers, budget, rng)
            chosen = places[is_chosen]
        else:
            chosen = rng.choice(places, budget, replace=False)
        chosen = np.sort(chosen)

        targets = np.zeros_like(tokens)
        targets[chosen] = tokens[chosen]
        weights = np.zeros(tokens.size, np.float32)
        weights[chosen] = 1

        # Of the chosen tokens most become the mask, some another token, some stay.
        lot = rng.random(chosen.size)
        is_masked = lot < self.masked
        is_replaced = ~is_masked & (lot < self.masked + self.random)
        mask_id = vocabulary.size - 1 if self.mask_id is None else self.mask_id
        masked_tokens = tokens.copy()
        masked_tokens[chosen[is_masked]] = mask_id
        replaced = chosen[is_replaced]
        ordinary_ids = np.flatnonzero(~is_special)
        masked_tokens[replaced] = rng.choice(ordinary_ids, replaced.size)
        return row | {"tokens": masked_tokens, "targets": targets, "weights": weights}

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.masked + self.random > 1:
            message = f"masked={self.masked} and random={self.random} are more than all"
            raise MaxlmError(message, fix="let them add up to at most 1")
        return self


def _choose_whole_words(
    words: NDArray[np.integer], budget: int, rng: Generator
) -> NDArray[np.bool_]:
    """Flags tokens [n] of words drawn at random until the budget of tokens is full;
    ``words``: the number of each token's word."""
    _, word_of_token, sizes = np.unique(words, return_inverse=True, return_counts=True)
    is_chosen = np.zeros(sizes.size, bool)
    for word in rng.permutation(sizes.size):
        size = int(sizes[word])
        if size <= budget:
            is_chosen[word] = True
            budget -= size
        if budget == 0:
            break
    return is_chosen[word_of_token]
