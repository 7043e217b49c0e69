"""Characters, words and symbols of running text, in every script, and Unicode's normal forms.

Words and symbols are found by a simplification of UAX #29:

- A *word* is a run of letters, marks and digits, over a single full stop, middle dot or underscore
  between two of them (e.g, snake_case) and a comma between digits (1,000). An apostrophe between
  two begins a word, as tokenizers for English and French have it: it 's, don 't, l 'homme.
- In scripts that put no spaces between words (Han, Hiragana, Thai, Lao, Khmer, Myanmar) each
  letter with its marks is a word.
- Every other visible character is a *symbol*; a run of the same one (`...`, `-----`) is one.
- Marks and format characters (joiners, soft hyphens, variation selectors) belong to what they
  follow, and are nothing after a space.
"""

import unicodedata
from functools import cache
from typing import Literal

import numpy as np
import regex

SPACE, ALONE, EXTEND = (1 << i for i in range(3))
"""Bits of a character's class: white space (`str.isspace`); a letter of a script without spaces,
which is a word by itself; a mark or format character, which belongs to what it follows."""

UNICODE = f"Unicode {unicodedata.unidata_version}"
"""The version of these tables, those of the running Python, on which labels depend."""

_ASSIGNED = 0x34000  # No letters or marks above, but for the variation selectors at E0000.
ALONE_RANGES = (
    "E00-EFF 1000-109F 1780-17FF 3005-3007 3040-309F 3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF"
)
"""Scripts without spaces: code points, inclusive."""
_ALONE_ENDS = [
    (int(a, 16), int(b, 16)) for a, b in (each.split("-") for each in ALONE_RANGES.split())
]


@cache
def get_character_classes() -> np.ndarray:
    """Makes the table of the class of every code point: uint8 [0x110000]."""
    classes = np.zeros(0x110000, np.uint8)
    for code in (*range(_ASSIGNED), *range(0xE0000, 0xE0200)):
        character = chr(code)
        kind = unicodedata.category(character)
        if character.isspace():
            classes[code] = SPACE
        elif kind[0] == "M" or kind == "Cf":
            classes[code] = EXTEND
    for first, last in _ALONE_ENDS:
        for code in range(first, last + 1):
            if unicodedata.category(chr(code))[0] == "L":
                classes[code] = ALONE
    return classes


_ALONE = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in _ALONE_ENDS)
_LETTER = rf"[\p{{L}}\p{{N}}--[\p{{L}}&&[{_ALONE}]]]"
_REST = rf"[\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}--[\p{{L}}&&[{_ALONE}]]]"
_MARKS = r"[\p{M}\p{Cf}]*+"
WORD = regex.compile(rf"(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}|{_LETTER}{_REST}*+")
"""A run of letters, marks and digits, or a letter of a script without spaces, with its marks."""
_TOKEN = regex.compile(
    rf"""(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}
    | (?: (?<={_REST})['’] )? {_LETTER}{_REST}*+
      (?: (?: [._·] | (?<=\p{{Nd}}),(?=\p{{Nd}}) ) {_LETTER}{_REST}*+ )*
    | (?P<symbol>[^\s\x1c-\x1f\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}]){_MARKS} (?: (?P=symbol){_MARKS} )*""",
    regex.VERBOSE,
)


def split_tokens(text: str) -> list[str]:
    """Splits a text into words and symbols."""
    return [found[0] for found in _TOKEN.finditer(text)]


def is_word(token: str) -> bool:
    """Tells a word, which has a letter, mark or digit, from a symbol."""
    return token[0].isalnum() or token[1:2].isalnum()


def has_letter(token: str) -> bool:
    """Tells whether a word or symbol has a letter."""
    return token.isalpha() or any(map(str.isalpha, token))


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
