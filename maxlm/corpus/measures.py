"""The measures of the heuristics stage, which documents them: Gopher's, C4's and FineWeb's."""

import re
from collections.abc import Collection, Iterable
from itertools import accumulate

import numpy as np
import regex

from maxlm.corpus.text import has_letter, is_word, split_tokens

Measures = dict[str, float | None]
"""Values by label; None for what a text does not have."""

_SHORT_LINE = 30  # FineWeb: characters.
_LONG_WORD = 1000  # C4: characters.
_FEWEST_WORDS = 3  # C4: in a line.
_TERMINAL = regex.compile(r"\p{Sentence_Terminal}")
_SENTENCE_END = regex.compile(r"\p{Sentence_Terminal}[\p{Sentence_Terminal}\"')\]”’»]*")
_QUOTES = re.compile("[\"')\\]”’»]")
_INITIAL = regex.compile(r"(?<!\p{L})\p{L}\Z")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_ASCII = re.IGNORECASE | re.ASCII
_LOREM = re.compile("lorem ipsum", _ASCII)
_JAVASCRIPT = re.compile("javascript", _ASCII)
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", _ASCII
)


def measure_text(text: str, stop_words: Collection[str]) -> Measures:
    """Computes every label of `stages.heuristics` of a text."""
    tokens = split_tokens(text)
    return {
        "characters": len(text),
        **_measure_words(text, tokens, stop_words),
        **_measure_repetition(text, tokens),
        **_measure_lines(text, len(tokens)),
        "curly_bracket": "{" in text,
        "lorem_ipsum": _LOREM.search(text) is not None,
        **_apply_c4(text.splitlines()),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _measure_words(text: str, tokens: list[str], stop_words: Collection[str]) -> Measures:
    """Computes Gopher's measures of quality."""
    lengths = [len(token) for token in tokens if is_word(token)]
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    return {
        "words": len(lengths),
        "mean_word_length": _ratio(sum(lengths), len(lengths)),
        "hash_ratio": _ratio(text.count("#"), len(tokens)),
        "ellipsis_ratio": _ratio(text.count("...") + text.count("…"), len(tokens)),
        "alphabetic_words": _ratio(sum(map(has_letter, tokens)), len(tokens)),
        "stop_words": len({*stop_words}.intersection(tokens)),
        "bullet_lines": _ratio(bullets, len(lines)),
        "ellipsis_lines": _ratio(trailing, len(lines)),
    }


def _count_repeated(pieces: Iterable[str]) -> tuple[int, int]:
    """Counts the pieces that were there before, and their characters."""
    seen: set[str] = set()
    number = characters = 0
    for piece in pieces:
        if piece in seen:
            number += 1
            characters += len(piece)
        seen.add(piece)
    return number, characters


def _measure_repetition(text: str, tokens: list[str]) -> Measures:
    """Computes Gopher's measures of repetition."""
    values: Measures = {}
    pieces = {"line": re.split("\n+", text), "paragraph": re.split("\n{2,}", text.strip())}
    for name, each in pieces.items():
        number, characters = _count_repeated(each)
        values[f"duplicate_{name}s"] = _ratio(number, len(each))
        values[f"duplicate_{name}_chars"] = _ratio(characters, len(text))
    names = [*(f"top_{n}gram" for n in (2, 3, 4)), *(f"duplicate_{n}grams" for n in range(5, 11))]
    counts = _count_ngram_characters(tokens)
    return values | {n: _ratio(c, len(text)) for n, c in zip(names, counts, strict=True)}


def _count_ngram_characters(tokens: list[str]) -> list[int]:
    """Counts characters in the most frequent n-gram (n from 2 to 4), spaces included, times how
    often it occurs, and in n-grams that were there before (n from 5 to 10), none counted twice."""
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(token, len(known)) for token in tokens], np.int64)
    ends = [0, *accumulate(map(len, tokens))]
    grams, repeats, counts = ids, True, []
    for n in range(2, 11):
        size = len(tokens) - n + 1
        if size < 1:
            counts.append(0)
            continue
        first, often = 0, 1
        if repeats:  # Else no longer one is there twice either.
            grams = grams[:size] * len(known) + ids[n - 1 :]
            _, firsts, grams, numbers = np.unique(
                grams, return_index=True, return_inverse=True, return_counts=True
            )
            often = int(numbers.max())
            first, repeats = int(firsts[numbers == often].min()), often > 1
        if n < 5:
            counts.append(often * (ends[first + n] - ends[first] + n - 1))
        else:
            counts.append(_count_covered(grams.tolist(), ends, n) if repeats else 0)
    return counts


def _count_covered(grams: list[int], ends: list[int], n: int) -> int:
    seen: set[int] = set()
    characters = i = 0
    while i < len(grams):
        if grams[i] in seen:
            characters += ends[i + n] - ends[i]
            i += n
        else:
            seen.add(grams[i])
            i += 1
    return characters


def _measure_lines(text: str, num_tokens: int) -> Measures:
    """Computes FineWeb's measures."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    newlines = text.count("\n")
    ended = sum(_TERMINAL.match(line[-1]) is not None for line in lines)
    short = sum(len(line) <= _SHORT_LINE for line in lines)
    return {
        "line_punct_ratio": _ratio(ended, len(lines)),
        "short_line_ratio": _ratio(short, len(lines)),
        "char_dup_ratio": _ratio(_count_repeated(lines)[1], len(text) - newlines),
        "list_ratio": _ratio(newlines, num_tokens),
    }


def _apply_c4(lines: list[str]) -> Measures:
    """Applies C4's rules to lines, in the order of its code, which gives up on the page at the
    first line with a curly bracket or "lorem ipsum"."""
    counts = [0] * 5
    kept = sentences = 0
    curly = lorem = False
    for line in lines:
        words = line.split()
        line = _CITATION.sub("", line.strip())
        punctuated = line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...")
        short = len(words) < _FEWEST_WORDS
        long = max(map(len, words), default=0) > _LONG_WORD
        javascript = _JAVASCRIPT.search(line) is not None
        policy = _POLICY.search(line) is not None
        for i, flag in enumerate((punctuated, short, long, javascript, policy)):
            counts[i] += flag
        if punctuated and not short and not long and not curly and not lorem:
            lorem = _LOREM.search(line) is not None
            curly = not lorem and not javascript and "{" in line
            if not (lorem or curly or javascript or policy):
                kept += 1
                sentences += _count_sentences(line)
    names = ("punctuated", "short", "long_word", "javascript", "policy")
    shares = {f"c4_{n}_lines": _ratio(c, len(lines)) for n, c in zip(names, counts, strict=True)}
    return {
        "c4_lines": kept,
        "c4_sentences": sentences,
        "c4_curly_bracket": curly,
        "c4_lorem_ipsum": lorem,
        **shares,
    }


def _count_sentences(line: str) -> int:
    """Counts the sentences of a line.

    One ends at marks that end sentences and the quotes and brackets that follow them, before a
    space; marks outside ASCII need no space. A full stop after a single letter ends none: initials,
    e.g., U.S.
    """
    ends = done = 0
    for end in _SENTENCE_END.finditer(line):
        marks = _QUOTES.sub("", end[0])
        after = line[end.end() : end.end() + 1]
        initial = marks == "." and _INITIAL.search(line, max(0, end.start() - 2), end.start())
        if not initial and (not marks.isascii() or not after or after.isspace()):
            ends, done = ends + 1, end.end()
    return ends + bool(line[done:].strip())
