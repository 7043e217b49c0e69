"""What counts as a word where texts are compared: a table that hot loops look into.

Words are runs of letters, marks and digits; in scripts that put no spaces between words each
letter is one (`corpus.characters`). Case makes no difference, nor do accents, marks of
U+0300..U+036F. A letter counts as its canonical decomposition, so that texts in NFC and in NFD have
the same words: a Korean syllable as its jamo, a voiced kana as a kana and a mark. Everything else,
punctuation and symbols, only separates words.
"""

import unicodedata
from functools import cache

import numpy as np

from maxlm.corpus.characters import ALONE, EXTEND, WORD, character_classes

SEPARATOR, IGNORED = 0, 1
SEVERAL, FOLLOWS, BY_ITSELF = 1 << 29, 1 << 30, 1 << 31
"""Bits: it counts as several letters; a mark, which is part of a word it follows but begins none; a
letter that is a word."""
PLACE = SEVERAL - 1
"""The bits of an entry with `SEVERAL` that say where its letters stand in the table."""


@cache
def letter_table() -> np.ndarray:
    """What each code point is in a word: uint32 [0x110000 + letters of those that are several].

    SEPARATOR, IGNORED (as if it were not there), or the letter that it counts as, with the bit
    FOLLOWS or BY_ITSELF where that is so. With the bit SEVERAL, `PLACE` says where in the table
    the letters begin that it counts as; a SEPARATOR ends them.
    """
    classes = character_classes()
    table = np.zeros(len(classes), np.uint32)
    several: list[int] = []
    for code in np.flatnonzero(classes & (WORD | EXTEND)).tolist():
        parts = [_entry(part, classes) for part in unicodedata.normalize("NFD", chr(code))]
        first, *rest = [part for part in parts if part != IGNORED] or [IGNORED]
        if rest:
            bits = first & (FOLLOWS | BY_ITSELF)
            table[code] = SEVERAL | bits | (len(table) + len(several))
            several += [first, *rest, SEPARATOR]
        else:
            table[code] = first
    return np.append(table, np.array(several, np.uint32))


def _entry(character: str, classes: np.ndarray) -> int:
    """The entry of a letter or mark that has no canonical decomposition."""
    code = ord(character)
    if "\u0300" <= character <= "\u036f" or unicodedata.category(character) == "Cf":
        return IGNORED
    if classes[code] & EXTEND:
        return code | FOLLOWS
    folded = character.casefold()
    letter = ord(folded if len(folded) == 1 else character.lower()[0])
    return letter | (BY_ITSELF if classes[code] & ALONE else 0)
