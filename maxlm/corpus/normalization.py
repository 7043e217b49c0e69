"""Unicode normalization in time proportional to the text."""

import unicodedata
from typing import Literal

import regex

# No language has 30 marks after one another.
_LONG_RUN = regex.compile("[\\p{M}\uff9e\uff9f]{30}(?=[\\p{M}\uff9e\uff9f])")
_JOINER = "\u034f"  # COMBINING GRAPHEME JOINER, which marks do not move across.


def normalize(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Normalizes a text as `unicodedata.normalize` does, but for runs of more than 30 marks.

    It takes a time for them that grows with their square: they are broken by U+034F, as in UAX
    #15's stream-safe format.
    """
    if not text.isascii():
        text = _LONG_RUN.sub(rf"\g<0>{_JOINER}", text)
    return unicodedata.normalize(form, text)
