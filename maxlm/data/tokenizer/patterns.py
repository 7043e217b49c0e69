"""How byte-level BPE tokenizers split a text before they merge: merges never cross these borders.

Each pattern gives every character to one rule, the first that matches; the last two take blanks.
"""

from typing import Any

from maxlm.data.tokenizer.pieces import flatten

_WORD = r"[^\p{L}\p{M}\p{N}\r\n]?[\p{L}\p{M}]+"  # a word, with one space or sign before it
_NUMBER = r"\p{N}{1,3}"  # digits by threes at most, so that numbers are spelled in few ways
_SIGNS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # punctuation, with the line ends that follow
_LINE_END = r"[^\S\r\n]*[\r\n]+"  # blanks at a line's end, then line ends
_BLANKS = r"[^\S\r\n]+(?!\S)|[^\S\r\n]+"  # indentation, less the blank that goes with a word
PATTERN = "|".join((_WORD, _NUMBER, _SIGNS, _LINE_END, _BLANKS))
"""Of the tokenizers that maxlm trains."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SUFFIX = f"(?i:{_CONTRACTIONS})"
_SPACES = r"\s+(?!\S)|\s+"
_GPT_4 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES
)
GPT_2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
PATTERNS = {
    "gpt2": GPT_2,
    "cl100k_base": _GPT_4 % _NUMBER,
    "o200k_base": _CASED % (f"{_SUFFIX}?", f"{_SUFFIX}?", _NUMBER),
    "qwen2": _GPT_4 % r"\p{N}",
    "tekken": _CASED % ("", "", r"\p{N}"),
}
"""Of well-known tokenizers, by name; Llama 3 splits as cl100k_base, gpt-oss as o200k_base."""


def known_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern here that is all that a tokenizer.json's pre_tokenizer splits by, if any."""
    match flatten(pre_tokenizer):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT_2
        case [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if p in (PATTERN, *PATTERNS.values()):
            return p
    return None
