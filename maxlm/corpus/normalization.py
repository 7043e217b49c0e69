"""Unicode normalization in time proportional to the text."""

import re
import unicodedata
from functools import cache
from typing import Literal

_MOST = 30  # Marks after one another; no language comes near.
_JOINER = "\u034f"  # COMBINING GRAPHEME JOINER, which marks do not move across.
_LAST = 0x20000  # No marks above.


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """`unicodedata.normalize`, but for runs of more than 30 marks, which it takes a time for that
    grows with their square: they are broken by U+034F, as in UAX #15's stream-safe format."""
    if not text.isascii() and _has_long_run(text):
        text = _long_run().sub(rf"\g<0>{_JOINER}", text)
    return unicodedata.normalize(form, text)


def _has_long_run(text: str) -> bool:
    marks, run = _marks(), _long_run()
    # Such a run covers one of these places.
    places = range(_MOST, len(text), _MOST + 1)
    return any(text[i] in marks and run.search(text, i - _MOST, i + _MOST + 1) for i in places)


@cache
def _marks() -> frozenset[str]:
    """Characters that are, or decompose to, what follows the beginning of a character."""
    characters = map(chr, range(_LAST))
    return frozenset(c for c in characters if unicodedata.combining(_decomposed(c)[0]))


def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFKD", character)


@cache
def _long_run() -> re.Pattern[str]:
    mark = f"[{''.join(sorted(_marks()))}]"
    return re.compile(f"{mark}{{{_MOST}}}(?={mark})")
