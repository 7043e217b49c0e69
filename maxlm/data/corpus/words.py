"""Texts as lines of plain words: lower case, no accents, one digit, few kinds of punctuation."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from maxlm.config import Config

# Scripts written without spaces: each character is a word.
_SOLID = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
# Python counts vowel signs and joiners of Indic, Arabic and Hebrew script as no letters.
_LETTERS = r"\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u0f00-\u0fff"
_WORD = re.compile(rf"[{_SOLID}]|(?:(?![{_SOLID}])[{_LETTERS}])+|[^\w\s\x00-\x1f\x7f-\x9f]")
_ACCENT = re.compile("[\u0300-\u036f]")
_DIGIT = re.compile(r"\d")
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»「」『』《》〈〉", '"'),
        **dict.fromkeys("‘’‚‛‹›´`′ʼ", "'"),
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
    if config.lower:
        text = text.lower()
    if not text.isascii():
        if config.accents:
            text = _ACCENT.sub("", unicodedata.normalize("NFKD", text))
        text = unicodedata.normalize("NFKC", text).translate(_PUNCTUATION)
    return _DIGIT.sub("0", text) if config.digits else text


def _open_split(tokenizer: str | None) -> Callable[[str], list[str]]:
    if tokenizer is None:
        return lambda line: _WORD.findall(line)
    from maxlm.data.tokenizer import load_tokenizer

    encode = load_tokenizer(Path(tokenizer)).encode
    return lambda line: [str(token) for token in encode(line)]
