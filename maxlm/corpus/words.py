"""Texts as lines of plain words: lower case, no accents, one digit, few kinds of punctuation."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from maxlm.config import Config
from maxlm.corpus.text import ALONE_RANGES, normalize

# Scripts written without spaces, here with Katakana: each character is a word.
_SOLID = "".join(
    "-".join(chr(int(code, 16)) for code in each.split("-"))
    for each in f"{ALONE_RANGES} 30A0-30FF".split()
)
# Python counts vowel signs and joiners of Indic, Arabic and Hebrew script as no letters.
_LETTERS = r"\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u0f00-\u0fff"
WORD_PATTERN = rf"[{_SOLID}]|(?:(?![{_SOLID}])[{_LETTERS}])+|[^\w\s\x00-\x1f\x7f-\x9f]"
"""A word, a character of a script without spaces, or a symbol."""
_WORD = re.compile(WORD_PATTERN)
_ACCENT = re.compile("[\u0300-\u036f]")
_DIGIT = re.compile(r"\d")
# None of ASCII: texts of ASCII alone skip this, and a line's words hang on no other line.
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


class WordsConfig(Config):
    """How a text becomes lines of words: in training and in use the same."""

    lower: bool = True
    """Letters are lowered."""
    accents: bool = True
    """Accents of Latin, Greek and Cyrillic letters are taken off."""
    digits: bool = True
    """Every digit becomes 0."""
    tokenizer: str | None = None
    """A folder with a tokenizer of maxlm, whose tokens are the words; null: runs of letters and
    digits, other characters one by one, as are those of scripts that put no spaces."""


Lines = Callable[[str], Iterator[str]]
"""From a text to its lines, of words separated by spaces; none without words."""


def open_lines(config: WordsConfig) -> Lines:
    """A function that turns texts into lines of words. Punctuation is unified as in CCNet."""
    split = _open_split(config.tokenizer)

    def lines(text: str) -> Iterator[str]:
        text = _normalised(text, config)
        for line in text.split("\n"):
            words = split(line)
            if words:
                yield " ".join(words)

    return lines


def _normalised(text: str, config: WordsConfig) -> str:
    if not text.isascii():
        if config.accents:
            text = _ACCENT.sub("", normalize("NFKD", text))
        text = normalize("NFKC", text).translate(_PUNCTUATION)
    if config.lower:  # After NFKC, which has capital letters for some signs.
        text = text.lower()
    return _DIGIT.sub("0", text) if config.digits else text


def _open_split(tokenizer: str | None) -> Callable[[str], list[str]]:
    if tokenizer is None:
        return lambda line: _WORD.findall(line)
    from maxlm.data.tokenizer import load_tokenizer

    encode = load_tokenizer(Path(tokenizer)).encode
    return lambda line: [str(token) for token in encode(line)]
