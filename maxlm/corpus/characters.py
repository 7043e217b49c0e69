"""Unicode character classes: a table that hot loops look into."""

import unicodedata
from functools import cache

import numpy as np

WORD, SPACE, ALONE, EXTEND = (1 << i for i in range(4))
"""Bits of a character's class: letter or digit; white space (`str.isspace`); a letter of a script
without spaces, which is a word by itself; a mark or format character, which belongs to what it
follows."""

UNICODE = f"Unicode {unicodedata.unidata_version}"
"""The version of these tables, those of the running Python, on which labels depend."""

_ASSIGNED = 0x34000  # No letters or marks above, but for the variation selectors at E0000.
ALONE_RANGES = (
    "E00-EFF 1000-109F 1780-17FF 3005-3007 3040-309F 3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF"
)
"""Scripts without spaces: code points, inclusive."""


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
        elif kind[0] in "LN":
            classes[code] = WORD
    for code in _list_codes(ALONE_RANGES):
        if unicodedata.category(chr(code))[0] == "L":
            classes[code] |= ALONE
    return classes


def _list_codes(ranges: str) -> list[int]:
    """Lists the code points of ranges such as "21 61D-61F"."""
    ends = [each.split("-") for each in ranges.split()]
    return [code for end in ends for code in range(int(end[0], 16), int(end[-1], 16) + 1)]
