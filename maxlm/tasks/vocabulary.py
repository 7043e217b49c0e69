"""The part of a tokenizer that tasks need to know."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of a model's table, and what they stand for."""

    size: int
    """Ids that text and reserved ids may have: the rows of the model's table."""
    text: int
    """Ids that the tokenizer knows; those above are free."""
    opening: tuple[int, ...]
    """The tokens that a document begins with in a store."""
    eos: int
    special: np.ndarray
    """bool [size]: ids that no text has."""
    starts_word: np.ndarray
    """bool [size]: ids with which a word begins."""
