"""What an objective needs to know of a tokenizer, without knowing one."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids and what they are."""

    size: int
    """Ids that text and marks may have: the rows of the model's table."""
    text: int
    """Ids that the tokenizer knows; those above are free for marks."""
    opening: tuple[int, ...]
    """What a document begins with in a store."""
    eos: int
    special: np.ndarray
    """bool [size]: ids that no text has."""
    starts_word: np.ndarray
    """bool [size]: ids with which a word begins."""
