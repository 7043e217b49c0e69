"""Characters, words and symbols of running text, in every script, and Unicode's normal
forms.

Words and symbols are found by a simplification of UAX #29:

- A *word* is a run of letters, marks and digits, over a single full stop, middle dot or
  underscore between two of them (e.g, snake_case) and a comma between digits (1,000).
  An apostrophe between two begins a word, as tokenizers for English and French have it:
  it 's, don 't, l 'homme.
- In scripts that put no spaces between words (Han, Hiragana, Thai, Lao, Khmer, Myanmar)
  each letter with its marks is a word.
- Every other visible character is a *symbol*; a run of the same one (`...`, `-----`) is
  one.
- Marks and format characters (joiners, soft hyphens, variation selectors) belong to
  what they follow, and are nothing after a space.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import regex

from maxlm.config import Config

SPACE = 1
ALONE = 2
EXTEND = 4
"""Bits of a character's class: white space (`str.isspace`); a letter of a script
without spaces, which is a word by itself; a mark or format character, which belongs to
what it follows."""

UNICODE = f"Unicode {unicodedata.unidata_version}"
"""The version of these tables, those of the running Python, on which labels depend."""

# No letters or marks above, but for the variation selectors at E0000.
_ASSIGNED = 0x34000
ALONE_RANGES = (
    (0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x309F),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Scripts without spaces: first and last code points."""


@cache
def get_code_point_classes() -> np.ndarray:
    """Makes the table of the class of every code point: uint8 [0x110000]."""
    classes = np.zeros(0x110000, np.uint8)
    for code in (*range(_ASSIGNED), *range(0xE0000, 0xE0200)):
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace():
            classes[code] = SPACE
        elif category[0] == "M" or category == "Cf":
            classes[code] = EXTEND
    for first, last in ALONE_RANGES:
        for code in range(first, last + 1):
            is_letter = unicodedata.category(chr(code))[0] == "L"
            if is_letter:
                classes[code] = ALONE
    return classes


# Parts of patterns: `regex` knows Unicode's properties and, by (?V1), differences (--)
# and intersections (&&) of classes.
_ALONE = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ALONE_RANGES)
_LETTER = rf"[\p{{L}}\p{{N}}--[\p{{L}}&&[{_ALONE}]]]"
# What a word goes on with.
_REST = rf"[\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}--[\p{{L}}&&[{_ALONE}]]]"
_MARKS = r"[\p{M}\p{Cf}]*+"
WORD = regex.compile(rf"(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}|{_LETTER}{_REST}*+")
"""A run of letters, marks and digits, or a letter of a script without spaces, with its
marks."""
_TOKEN = regex.compile(
    rf"""(?V1)[\p{{L}}&&[{_ALONE}]]{_MARKS}
    | (?: (?<={_REST})['’] )? {_LETTER}{_REST}*+
      (?: (?: [._·] | (?<=\p{{Nd}}),(?=\p{{Nd}}) ) {_LETTER}{_REST}*+ )*
    | (?P<symbol>[^\s\x1c-\x1f\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}]){_MARKS} (?: (?P=symbol){_MARKS} )*""",
    regex.VERBOSE,
)


def split_words_and_symbols(text: str) -> list[str]:
    """Splits a text into words and symbols."""
    return [match[0] for match in _TOKEN.finditer(text)]


def is_word(token: str) -> bool:
    """Tells a word, which has a letter, mark or digit, from a symbol."""
    return token[0].isalnum() or token[1:2].isalnum()


def has_letter(token: str) -> bool:
    """Tells whether a word or symbol has a letter."""
    return token.isalpha() or any(map(str.isalpha, token))


# No language has 30 marks after one another.
_LONG_RUN = regex.compile("[\\p{M}\uff9e\uff9f]{30}(?=[\\p{M}\uff9e\uff9f])")
_JOINER = "\u034f"  # COMBINING GRAPHEME JOINER, which marks do not move across.


def normalize_unicode(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str) -> str:
    """Normalizes a text as `unicodedata.normalize` does, but for runs of more than 30
    marks.

    It takes a time for them that grows with their square: they are broken by U+034F, as
    in UAX #15's stream-safe format.
    """
    if not text.isascii():
        text = _LONG_RUN.sub(rf"\g<0>{_JOINER}", text)
    return unicodedata.normalize(form, text)


# Scripts written without spaces, here with Katakana: each character is a word.
_SOLID_RANGES = (*ALONE_RANGES, (0x30A0, 0x30FF))
_SOLID = "".join(f"{chr(first)}-{chr(last)}" for first, last in _SOLID_RANGES)
# Python counts vowel signs and joiners of Indic, Arabic and Hebrew script as no
# letters.
_LETTERS = (
    r"\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u0f00-\u0fff"
)
WORD_PATTERN = rf"[{_SOLID}]|(?:(?![{_SOLID}])[{_LETTERS}])+|[^\w\s\x00-\x1f\x7f-\x9f]"
"""A word, a character of a script without spaces, or a symbol."""
_WORD = re.compile(WORD_PATTERN)
ACCENT = re.compile("[\u0300-\u036f]")
_DIGIT = re.compile(r"\d")
# None of ASCII: texts of ASCII alone skip this, and a line's words hang on no other
# line.
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»「」『』《》〈〉", '"'),
        **dict.fromkeys("‘’‚‛‹›′ʼ", "'"),
        **dict.fromkeys("‐‑‒–—―−─━", "-"),
        **dict.fromkeys("。।॥۔｡", "."),
        **dict.fromkeys("、،､", ","),
        **dict.fromkeys("•·●▪■◆※", "*"),
        "؟": "?",
        "؛": ";",
        "【": "[",
        "】": "]",
    }
)


class LineSplitterConfig(Config):
    """Rules by which a text becomes lines of words, the same in training and in use."""

    lower: bool = True
    """Letters are lowered."""
    accents: bool = True
    """Accents of Latin, Greek and Cyrillic letters are taken off."""
    digits: bool = True
    """Every digit becomes 0."""
    tokenizer: str | None = None
    """A folder with a tokenizer of maxlm, whose tokens are the words; null: runs of
    letters and digits, other characters one by one, as are those of scripts that put no
    spaces."""


def make_line_splitter(config: LineSplitterConfig) -> Callable[[str], Iterator[str]]:
    """Makes a function from a text to its lines, of words separated by spaces; none
    without words. Punctuation is unified as in CCNet."""
    encode: Callable[[str], list[int]] | None = None
    if config.tokenizer is not None:
        from maxlm.data.tokenizer.load import load_tokenizer

        encode = load_tokenizer(Path(config.tokenizer)).encode

    def split_words(line: str) -> list[str]:
        if encode is None:
            return _WORD.findall(line)
        return [str(token) for token in encode(line)]

    def split_lines(text: str) -> Iterator[str]:
        for line in _normalize_words(text, config).split("\n"):
            words = split_words(line)
            if words:
                yield " ".join(words)

    return split_lines


def _normalize_words(text: str, config: LineSplitterConfig) -> str:
    if not text.isascii():
        if config.accents:
            text = ACCENT.sub("", normalize_unicode("NFKD", text))
        text = normalize_unicode("NFKC", text).translate(_PUNCTUATION)
    if config.lower:  # After NFKC, which has capital letters for some signs.
        text = text.lower()
    if config.digits:
        text = _DIGIT.sub("0", text)
    return text
