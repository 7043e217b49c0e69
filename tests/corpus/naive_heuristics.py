"""The measures of the heuristics stage, written down once more as plainly as can be."""

import re
import unicodedata
from collections import Counter

import numpy as np
import regex

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_SPACE = "".join(c for c in map(chr, range(0x110000)) if c.isspace())
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff"
_WORD = r"[\p{L}\p{N}--[\p{L}&&[" + _ALONE + r"]]]"
_EXTEND = r"[\p{M}\p{Cf}]*"
_JOINT = r"[\p{L}\p{N}\p{M}\p{Cf}--[\p{L}&&[" + _ALONE + r"]]]"
_TOKEN = regex.compile(
    rf"""(?V1)[\p{{L}}&&[{_ALONE}]]{_EXTEND}
    | (?: (?<={_JOINT})['’] )? {_WORD}{_EXTEND}
      (?: (?: [._·] | (?<=\p{{Nd}}),(?=\p{{Nd}}) )? {_WORD}{_EXTEND} )*
    | (?P<symbol>[^{_SPACE}\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}]){_EXTEND} (?: (?P=symbol){_EXTEND} )*""",
    regex.VERBOSE,
)


def tokens(text: str) -> list[str]:
    """Words and symbols."""
    return [match[0] for match in _TOKEN.finditer(text)]


def is_word(token: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" for c in token)


def repeated(pieces: list[str]) -> list[str]:
    """Those that are there before."""
    return [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]


def chars(pieces: list[str]) -> int:
    return sum(map(len, pieces))


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def measures(
    text: str, stop_words: tuple[str, ...] = STOP_WORDS
) -> dict[str, float | None]:
    """Every label of a text."""
    return {
        "characters": len(text),
        **_gopher_quality(text, stop_words),
        **_gopher_repetition(text),
        **_fineweb(text),
        "curly_bracket": "{" in text,
        "lorem_ipsum": "lorem ipsum" in _lower(text),
        **_c4(text),
    }


def _lower(text: str) -> str:
    return "".join(c.lower() if c < "\x80" else c for c in text)


def _gopher_quality(text: str, stop_words: tuple[str, ...]) -> dict[str, float | None]:
    text_tokens = tokens(text)
    lines = text.splitlines()
    words = [token for token in text_tokens if is_word(token)]
    letters = [token for token in text_tokens if any(c.isalpha() for c in token)]
    bullets = [line for line in lines if line.lstrip()[:1] in ("•", "-")]
    trailing = [line for line in lines if line.rstrip().endswith(("...", "…"))]
    return {
        "words": len(words),
        "mean_word_length": ratio(chars(words), len(words)),
        "hash_ratio": ratio(text.count("#"), len(text_tokens)),
        "ellipsis_ratio": ratio(text.count("...") + text.count("…"), len(text_tokens)),
        "alphabetic_words": ratio(len(letters), len(text_tokens)),
        "stop_words": len(set(stop_words) & set(text_tokens)),
        "bullet_lines": ratio(len(bullets), len(lines)),
        "ellipsis_lines": ratio(len(trailing), len(lines)),
    }


def _gopher_repetition(text: str) -> dict[str, float | None]:
    lines = re.split("\n+", text)
    paragraphs = re.split("\n{2,}", text.strip())
    size = len(text)
    values = {
        "duplicate_lines": ratio(len(repeated(lines)), len(lines)),
        "duplicate_line_chars": ratio(chars(repeated(lines)), size),
        "duplicate_paragraphs": ratio(len(repeated(paragraphs)), len(paragraphs)),
        "duplicate_paragraph_chars": ratio(chars(repeated(paragraphs)), size),
    }
    text_tokens = tokens(text)
    for n in (2, 3, 4):
        starts = range(len(text_tokens) - n + 1)
        counts = Counter(" ".join(text_tokens[i : i + n]) for i in starts)
        gram, times = max(counts.items(), key=lambda item: item[1], default=("", 0))
        values[f"top_{n}gram"] = ratio(len(gram) * times, size)
    for n in range(5, 11):
        seen = set()
        doubled = 0
        i = 0
        while i + n <= len(text_tokens):
            gram = tuple(text_tokens[i : i + n])
            if gram in seen:
                # No character counts twice: go on behind the repeated words.
                doubled += chars(list(gram))
                i += n
            else:
                seen.add(gram)
                i += 1
        values[f"duplicate_{n}grams"] = ratio(doubled, size)
    return values


def _fineweb(text: str) -> dict[str, float | None]:
    lines = [line for line in text.split("\n") if line.strip()]
    ended = [line for line in lines if regex.search(r"\p{Sentence_Terminal}\Z", line)]
    short = [line for line in lines if len(line) <= 30]
    size_without_breaks = len(text.replace("\n", ""))
    return {
        "line_punct_ratio": ratio(len(ended), len(lines)),
        "short_line_ratio": ratio(len(short), len(lines)),
        "char_dup_ratio": ratio(chars(repeated(lines)), size_without_breaks),
        "list_ratio": ratio(text.count("\n"), len(tokens(text))),
    }


def _c4(text: str) -> dict[str, float | None]:
    policies = (
        "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
        "use cookies",
    )  # fmt: skip
    flags = []
    kept_lines = []
    curly = False
    lorem = False
    for line in text.splitlines():
        words = line.split()
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip())
        low = _lower(line)
        ends_with_mark = line.endswith((".", "?", "!", '"', "'"))
        punctuated = ends_with_mark and not line.endswith("...")
        short = len(words) < 3
        long = any(len(word) > 1000 for word in words)
        javascript = "javascript" in low
        policy = any(phrase in low for phrase in policies)
        flags.append((punctuated, short, long, javascript, policy))
        if punctuated and not short and not long and not curly and not lorem:
            lorem = "lorem ipsum" in low
            curly = not lorem and not javascript and "{" in line
            if not (lorem or curly or javascript or policy):
                kept_lines.append(line)
    shares = np.mean(flags, axis=0) if flags else [None] * 5
    return {
        "c4_lines": len(kept_lines),
        "c4_sentences": sum(map(sentences, kept_lines)),
        "c4_curly_bracket": curly,
        "c4_lorem_ipsum": lorem,
        "c4_punctuated_lines": shares[0],
        "c4_short_lines": shares[1],
        "c4_long_word_lines": shares[2],
        "c4_javascript_lines": shares[3],
        "c4_policy_lines": shares[4],
    }


_END = regex.compile(r"\p{Sentence_Terminal}[\p{Sentence_Terminal}\"')\]”’»]*")


def sentences(line: str) -> int:
    """Ends of sentences before the line's last visible character, and one for the
    rest."""
    ends = 0
    rest = line
    for end in _END.finditer(line):
        marks = regex.sub(r"[\"')\]”’»]", "", end[0])
        before = line[: end.start()]
        after = line[end.end() :]
        # "Dr. A. Smith": a lone letter before a full stop is an initial.
        is_initial = marks == "." and regex.search(r"(?<!\p{L})\p{L}\Z", before)
        # Marks of other scripts need no space behind them.
        is_followed_by_space = not after or after[0].isspace()
        if not is_initial and (not marks.isascii() or is_followed_by_space):
            ends += 1
            rest = after
    return ends + bool(rest.strip())
