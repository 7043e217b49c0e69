"""What counts as a word where texts are compared: a table that hot loops look into.

Words are runs of letters, marks and digits; in scripts that put no spaces between words each
letter is one (`corpus.characters`). Case makes no difference, nor do accents: a letter whose
canonical decomposition is a base and marks of U+0300..U+036F counts as the base. Everything else,
punctuation and symbols, only separates words.
"""

import unicodedata
from functools import cache

import numpy as np

from maxlm.data.corpus.characters import ALONE, EXTEND, WORD, character_classes

SEPARATOR, IGNORED = 0, 1
FOLLOWS, BY_ITSELF = 1 << 30, 1 << 31
"""Bits: a mark, which is part of a word it follows but begins none; a letter that is a word."""


@cache
def letter_table() -> np.ndarray:
    """What each code point is in a word: uint32 [0x110000].

    SEPARATOR, IGNORED (as if it were not there), or the letter that it counts as, with the bit
    FOLLOWS or BY_ITSELF where that is so.
    """
    classes = character_classes()
    table = np.zeros(len(classes), np.uint32)
    for code in np.flatnonzero(classes & (WORD | EXTEND)).tolist():
        character = chr(code)
        if _is_accent(character) or unicodedata.category(character) == "Cf":
            table[code] = IGNORED
        elif classes[code] & EXTEND:
            table[code] = code | FOLLOWS
        else:
            table[code] = _letter(character) | (BY_ITSELF if classes[code] & ALONE else 0)
    return table


def _is_accent(character: str) -> bool:
    return "\u0300" <= character <= "\u036f"


def _letter(character: str) -> int:
    base, *marks = unicodedata.normalize("NFD", character)
    if not all(map(_is_accent, marks)):
        base = character
    folded = base.casefold()
    return ord(folded if len(folded) == 1 else base.lower()[0])
