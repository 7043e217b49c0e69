"""Measures of running text after Gopher, C4 and FineWeb."""

from collections.abc import Callable
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.measures import Measures, measure_text
from maxlm.corpus.stage import LabelStage
from maxlm.corpus.text import UNICODE, split_tokens

GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_COUNTS = ("characters", "words", "stop_words", "c4_lines", "c4_sentences")
_FLAGS = ("curly_bracket", "lorem_ipsum", "c4_curly_bracket", "c4_lorem_ipsum")
_TYPES = dict.fromkeys(_COUNTS, pa.int32()) | dict.fromkeys(_FLAGS, pa.bool_())
LABELS: dict[str, pa.DataType] = {
    name: _TYPES.get(name, pa.float64())
    for name in (
        "characters", "words", "mean_word_length", "hash_ratio", "ellipsis_ratio",
        "alphabetic_words", "stop_words", "bullet_lines", "ellipsis_lines",
        "duplicate_lines", "duplicate_line_chars",
        "duplicate_paragraphs", "duplicate_paragraph_chars",
        "top_2gram", "top_3gram", "top_4gram",
        "duplicate_5grams", "duplicate_6grams", "duplicate_7grams",
        "duplicate_8grams", "duplicate_9grams", "duplicate_10grams",
        "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio",
        "curly_bracket", "lorem_ipsum",
        "c4_lines", "c4_sentences", "c4_curly_bracket", "c4_lorem_ipsum",
        "c4_punctuated_lines", "c4_short_lines", "c4_long_word_lines",
        "c4_javascript_lines", "c4_policy_lines",
    )
}  # fmt: skip
"""The labels. Ratios are float64, so that a ratio of counts that equals a threshold is equal."""

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
        " and heuristics.duplicate_5grams <= 0.15 and heuristics.duplicate_6grams <= 0.14"
        " and heuristics.duplicate_7grams <= 0.13 and heuristics.duplicate_8grams <= 0.12"
        " and heuristics.duplicate_9grams <= 0.11 and heuristics.duplicate_10grams <= 0.1"
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
"""The published thresholds, as expressions over the labels of a stage named "heuristics"."""


class HeuristicsStage(LabelStage):
    """Measures of running text: Gopher (arXiv 2112.11446, A.1), C4 (arXiv 1910.10683, 2.2 and its
    code, c4_utils.py), FineWeb (arXiv 2406.17557, 3.6; FineWebQualityFilter of datatrove).

    Where a paper leaves a measure open it is as in datatrove, and equal to datatrove's on the same
    words. Words are not the same: datatrove asks a tokenizer for each language (spaCy for English),
    this stage takes one rule for all (`maxlm.corpus.text`), under which "don't" is two
    words, an address is several, and a run of one sign is one. Below, "words and symbols" are all
    of them, "words" those with a letter, mark or digit (datatrove has a list of signs that make no
    word, without • or →). Labels that a text has no measure for (a ratio of lines without lines)
    are null, and an expression with a null keeps nothing.

    Gopher, quality:
    - `words`; `mean_word_length` (characters); `characters` (code points, for reference);
    - `hash_ratio`, `ellipsis_ratio`: signs # and "..." or "…" to words and symbols;
    - `alphabetic_words`: words and symbols with a letter, of all words and symbols;
    - `stop_words`: how many different stop words occur, in this very case;
    - `bullet_lines`, `ellipsis_lines`: lines that begin with • or -, that end with an ellipsis.

    Gopher, repetition (fractions of the text's characters where it says chars or grams):
    - `duplicate_lines`, `duplicate_line_chars`, `duplicate_paragraphs`,
      `duplicate_paragraph_chars`: those that were there before; lines lie between runs of newlines,
      paragraphs between runs of two and more;
    - `top_2gram` to `top_4gram`: the most frequent n-gram, times how often it occurs;
    - `duplicate_5grams` to `duplicate_10grams`: n-grams that were there before, read from the start
      and going on behind each, so that no character counts twice.

    C4:
    - `c4_punctuated_lines` (end with . ? ! " ' and not with ...; as in datatrove: the paper has no
      '), `c4_short_lines` (< 3 words between spaces), `c4_long_word_lines` (a word of > 1000
      characters), `c4_javascript_lines`, `c4_policy_lines` ("terms of use", "cookie policy", ...):
      fractions of lines, citations like [1] left out;
    - `c4_lines`, `c4_sentences`: lines that these rules keep, and sentences in them (a rule in
      place of a trained splitter; the lines left out by C4 stay in the text);
    - `c4_curly_bracket`, `c4_lorem_ipsum`: in a line that is punctuated and not short, which is
      what C4's code discards a page for; `curly_bracket`, `lorem_ipsum`: anywhere, as the paper
      says.

    FineWeb: `line_punct_ratio` (lines that end with a mark that ends sentences in any script),
    `short_line_ratio` (<= 30 characters), both of lines that are not blank; `char_dup_ratio`
    (characters in lines that were there before, of those that are no newlines); `list_ratio`
    (newlines to words and symbols).

    `PUBLISHED` has the thresholds. They were found on English and make little sense for languages
    that are written without spaces, where a word is a letter here.
    """

    stage: Literal["heuristics"] = "heuristics"

    stop_words: tuple[str, ...] = GOPHER_STOP_WORDS
    """The words that `stop_words` counts; each a single word. For several languages: a stage for
    each, with `name` and `where`."""

    longest: int = Field(default=8 << 20, ge=1, lt=1 << 31)
    """Bytes of a text to measure; the rest is skipped. Bounds memory: about 130 bytes for each, at
    worst."""

    version: ClassVar[int] = 2

    def schema(self) -> pa.Schema:
        return pa.schema(list(LABELS.items()))

    def key(self) -> str:
        return f"{super().key()} {UNICODE}"

    def open_row(self) -> Callable[[str | None], Measures]:
        """See `LabelStage`. Raises: MaxlmError: a stop word is several words."""
        for word in self.stop_words:
            if (number := len(split_tokens(word))) != 1:
                what = f"stop_words: {word!r} is {number} words, where one is asked for"
                raise MaxlmError(what, where="heuristics", fix="give each word by itself")

        def label(text: str | None) -> Measures:
            text = text or ""
            if 4 * len(text) > self.longest:
                text = text.encode()[: self.longest].decode("utf-8", "ignore")
            return measure_text(text, self.stop_words)

        return label

    def packages(self) -> tuple[str, ...]:
        return ("regex",)
