"""What each Unicode character is to a tokenizer of running text: a table that hot loops look into.

Words and punctuation marks are found by a simplification of Unicode's word boundaries (UAX #29),
which needs no dictionary and treats every script:

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

import numpy as np

WORD, LETTER, SPACE, BREAK, ALONE, DIGIT, TERMINAL, EXTEND = (1 << i for i in range(8))
"""Bits of a character's class: part of a word; a letter (`str.isalpha`); white space
(`str.isspace`); ends a line (`str.splitlines`); a word by itself; a decimal digit; ends a sentence
(Unicode's Sentence_Terminal); belongs to what it follows."""

AS_IS = np.empty(0, np.int32)
"""In place of `lower_case()`: upper and lower case are different."""

UNICODE = f"Unicode {unicodedata.unidata_version}"
"""What labels by these tables depend on besides: they are those of the running Python."""

_ASSIGNED = 0x34000  # No letters or marks above, but for the variation selectors at E0000.
_CASED = 0x1F000  # No character above has a lower case.
ALONE_RANGES = (
    "E00-EFF 1000-109F 1780-17FF 3005-3007 3040-309F 3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF"
)
"""Scripts without spaces: code points, inclusive."""
# PropList.txt of Unicode 17: Sentence_Terminal.
_TERMINAL = """
    21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E
    1735-1736 17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F
    1C3B-1C3C 1C7E-1C7F 2024 203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF
    A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16
    FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1
    11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 113D4-113D5
    1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43
    11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44
    16D6E-16D6F 16E98 1BC9F 1DA88
"""


@cache
def character_classes() -> np.ndarray:
    """The class of every code point: uint8 [0x110000]."""
    classes = np.zeros(0x110000, np.uint8)
    for code in (*range(_ASSIGNED), *range(0xE0000, 0xE0200)):
        character = chr(code)
        kind = unicodedata.category(character)
        if character.isspace():
            classes[code] = SPACE
        elif kind[0] == "M" or kind == "Cf":
            classes[code] = EXTEND
        elif kind[0] in "LN":
            letter, digit = LETTER * (kind[0] == "L"), DIGIT * (kind == "Nd")
            classes[code] = WORD | letter | digit
    for line_end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029":
        classes[ord(line_end)] |= BREAK
    for code in _codes(ALONE_RANGES):
        if classes[code] & LETTER:
            classes[code] |= ALONE
    classes[_codes(_TERMINAL)] |= TERMINAL
    return classes


@cache
def lower_case() -> np.ndarray:
    """The lower case of every code point that may have one, where it is one character: int32."""
    lower = [character.lower() for character in map(chr, range(_CASED))]
    return np.array([ord(x) if len(x) == 1 else i for i, x in enumerate(lower)], np.int32)


def _codes(ranges: str) -> list[int]:
    """The code points of ranges such as "21 61D-61F"."""
    ends = [each.split("-") for each in ranges.split()]
    return [code for end in ends for code in range(int(end[0], 16), int(end[-1], 16) + 1)]
