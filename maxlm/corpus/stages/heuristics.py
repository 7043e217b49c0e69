"""Measures of running text after Gopher, C4 and FineWeb; `HeuristicsStage` documents
them."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import regex
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage
from maxlm.corpus.text import has_letter, is_word, split_words_and_symbols

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
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies",
    _ASCII,
)


def measure_text(text: str, stop_words: Collection[str]) -> Measures:
    """Computes every label of `stages.heuristics` of a text."""
    tokens = split_words_and_symbols(text)
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


def _measure_words(
    text: str, tokens: list[str], stop_words: Collection[str]
) -> Measures:
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
    repeats = {piece: count - 1 for piece, count in Counter(pieces).items()}
    return sum(repeats.values()), sum(len(piece) * n for piece, n in repeats.items())


def _measure_repetition(text: str, tokens: list[str]) -> Measures:
    """Computes Gopher's measures of repetition."""
    values: Measures = {}
    pieces = {
        "line": re.split("\n+", text),
        "paragraph": re.split("\n{2,}", text.strip()),
    }
    for name, each in pieces.items():
        number, characters = _count_repeated(each)
        values[f"duplicate_{name}s"] = _ratio(number, len(each))
        values[f"duplicate_{name}_chars"] = _ratio(characters, len(text))
    names = [
        *(f"top_{n}gram" for n in (2, 3, 4)),
        *(f"duplicate_{n}grams" for n in range(5, 11)),
    ]
    counts = _count_ngram_characters(tokens)
    return values | {
        n: _ratio(c, len(text)) for n, c in zip(names, counts, strict=True)
    }


def _count_ngram_characters(tokens: list[str]) -> list[int]:
    """Counts characters in the most frequent n-gram (n from 2 to 4), spaces included,
    times how often it occurs, and in n-grams that were there before (n from 5 to 10),
    none counted twice."""
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(token, len(known)) for token in tokens], np.int64)
    ends = [0, *accumulate(map(len, tokens))]
    grams = ids
    repeats = True
    counts = []
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
            first = int(firsts[numbers == often].min())
            repeats = often > 1
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
    return {
        "line_punct_ratio": _ratio(ended, len(lines)),
        "short_line_ratio": _ratio(
            sum(len(line) <= _SHORT_LINE for line in lines), len(lines)
        ),
        "char_dup_ratio": _ratio(_count_repeated(lines)[1], len(text) - newlines),
        "list_ratio": _ratio(newlines, num_tokens),
    }


def _apply_c4(lines: list[str]) -> Measures:
    """Applies C4's rules to lines, in the order of its code, which gives up on the page
    at the first line with a curly bracket or "lorem ipsum"."""
    counts = [0] * 5
    kept = sentences = 0
    curly = lorem = False
    for line in lines:
        words = line.split()
        line = _CITATION.sub("", line.strip())
        punctuated = line.endswith((".", "?", "!", '"', "'")) and not line.endswith(
            "..."
        )
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
    return {
        "c4_lines": kept,
        "c4_sentences": sentences,
        "c4_curly_bracket": curly,
        "c4_lorem_ipsum": lorem,
        **{
            f"c4_{n}_lines": _ratio(c, len(lines))
            for n, c in zip(names, counts, strict=True)
        },
    }


def _count_sentences(line: str) -> int:
    """Counts the sentences of a line.

    One ends at marks that end sentences and the quotes and brackets that follow them,
    before a space; marks outside ASCII need no space. A full stop after a single letter
    ends none: initials, e.g., U.S.
    """
    ends = done = 0
    for end in _SENTENCE_END.finditer(line):
        marks = _QUOTES.sub("", end[0])
        after = line[end.end() : end.end() + 1]
        initial = marks == "." and _INITIAL.search(
            line, max(0, end.start() - 2), end.start()
        )
        if not initial and (not marks.isascii() or not after or after.isspace()):
            ends = ends + 1
            done = end.end()
    return ends + bool(line[done:].strip())


GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_TYPES = {bool: pa.bool_(), int: pa.int32()}
LABELS = {
    n: _TYPES.get(type(v), pa.float64()) for n, v in measure_text("a", ()).items()
}
"""The labels. Ratios are float64, so that a ratio of counts that equals a threshold is
equal."""

PUBLISHED: dict[str, str] = {
    "gopher_quality": (
        "heuristics.words >= 50 and heuristics.words <= 100000"
        " and heuristics.mean_word_length >= 3 and heuristics.mean_word_length <= 10"
        " and heuristics.hash_ratio <= 0.1 and heuristics.ellipsis_ratio <= 0.1"
        " and heuristics.bullet_lines <= 0.9 and heuristics.ellipsis_lines <= 0.3"
        " and heuristics.alphabetic_words >= 0.8 and heuristics.stop_words >= 2"
    ),
    "gopher_repetition": (
        "heuristics.duplicate_lines <= 0.3 and heuristics.duplicate_line_chars <= 0.2"
        " and heuristics.duplicate_paragraphs <= 0.3"
        " and heuristics.duplicate_paragraph_chars <= 0.2"
        " and heuristics.top_2gram <= 0.2 and heuristics.top_3gram <= 0.18"
        " and heuristics.top_4gram <= 0.16"
        " and heuristics.duplicate_5grams <= 0.15 and heuristics.duplicate_6grams <= "
        "0.14"
        " and heuristics.duplicate_7grams <= 0.13 and heuristics.duplicate_8grams <= "
        "0.12"
        " and heuristics.duplicate_9grams <= 0.11 and heuristics.duplicate_10grams <= "
        "0.1"
    ),
    "c4": (
        "heuristics.c4_sentences >= 5"
        " and not heuristics.c4_curly_bracket and not heuristics.c4_lorem_ipsum"
    ),
    "fineweb": (
        "heuristics.line_punct_ratio >= 0.12 and heuristics.short_line_ratio <= 0.67"
        " and heuristics.char_dup_ratio <= 0.01 and heuristics.list_ratio <= 0.3"
    ),
}
"""The published thresholds, as expressions over the labels of a stage named
"heuristics"."""


class HeuristicsStage(PerDocumentStage):
    """Measures of running text: Gopher (arXiv 2112.11446, A.1), C4 (arXiv 1910.10683,
    2.2 and its code, c4_utils.py), FineWeb (arXiv 2406.17557, 3.6; FineWebQualityFilter
    of datatrove).

    Where a paper leaves a measure open it is as in datatrove, and equal to datatrove's
    on the same words. Words are not the same: datatrove asks a tokenizer for each
    language (spaCy for English), this stage takes one rule for all
    (`maxlm.corpus.text`), under which "don't" is two words, an address is several, and
    a run of one sign is one. Below, "words and symbols" are all of them, "words" those
    with a letter, mark or digit (datatrove has a list of signs that make no word,
    without • or →). Labels that a text has no measure for (a ratio of lines without
    lines) are null, and an expression with a null keeps nothing.

    Gopher, quality:
    - `words`; `mean_word_length` (characters); `characters` (code points, for
      reference);
    - `hash_ratio`, `ellipsis_ratio`: signs # and "..." or "…" to words and symbols;
    - `alphabetic_words`: words and symbols with a letter, of all words and symbols;
    - `stop_words`: how many different stop words occur, in this very case;
    - `bullet_lines`, `ellipsis_lines`: lines that begin with • or -, that end with an
      ellipsis.

    Gopher, repetition (fractions of the text's characters where it says chars or
    grams):
    - `duplicate_lines`, `duplicate_line_chars`, `duplicate_paragraphs`,
      `duplicate_paragraph_chars`: those that were there before; lines lie between runs
      of newlines, paragraphs between runs of two and more;
    - `top_2gram` to `top_4gram`: the most frequent n-gram, times how often it occurs;
    - `duplicate_5grams` to `duplicate_10grams`: n-grams that were there before, read
      from the start and going on behind each, so that no character counts twice.

    C4:
    - `c4_punctuated_lines` (end with . ? ! " ' and not with ...; as in datatrove: the
      paper has no '), `c4_short_lines` (< 3 words between spaces), `c4_long_word_lines`
      (a word of > 1000 characters), `c4_javascript_lines`, `c4_policy_lines` ("terms of
      use", "cookie policy", ...): fractions of lines, citations like [1] left out;
    - `c4_lines`, `c4_sentences`: lines that these rules keep, and sentences in them (a
      rule in place of a trained splitter; the lines left out by C4 stay in the text);
    - `c4_curly_bracket`, `c4_lorem_ipsum`: in a line that is punctuated and not short,
      which is what C4's code discards a page for; `curly_bracket`, `lorem_ipsum`:
      anywhere, as the paper says.

    FineWeb: `line_punct_ratio` (lines that end with a mark that ends sentences in any
    script), `short_line_ratio` (<= 30 characters), both of lines that are not blank;
    `char_dup_ratio` (characters in lines that were there before, of those that are no
    newlines); `list_ratio` (newlines to words and symbols).

    `PUBLISHED` has the thresholds. They were found on English and make little sense for
    languages that are written without spaces, where a word is a letter here.
    """

    stage: Literal["heuristics"] = "heuristics"
    stop_words: tuple[str, ...] = GOPHER_STOP_WORDS
    """The words that `stop_words` counts; each a single word. For several languages: a
    stage for each, with `name` and `where`."""
    longest: int = Field(default=8 << 20, ge=1, lt=1 << 31)
    """Bytes of a text to measure; the rest is skipped. Bounds memory: about 130 bytes
    for each, at worst."""
    label_types: ClassVar[LabelTypes] = LABELS
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = ("regex",)
    depends_on_unicode: ClassVar[bool] = True

    def make_row_label_fn(self) -> Callable[[str | None], Measures]:
        """Raises: MaxlmError: a stop word is several words."""
        for word in self.stop_words:
            number = len(split_words_and_symbols(word))
            if number != 1:
                what = f"stop_words: {word!r} is {number} words, where one is asked for"
                raise MaxlmError(
                    what, where="heuristics", fix="give each word by itself"
                )

        def label(text: str | None) -> Measures:
            text = text or ""
            if 4 * len(text) > self.longest:
                text = text.encode()[: self.longest].decode("utf-8", "ignore")
            return measure_text(text, self.stop_words)

        return label
