"""Signs of toxic and sexual text: a shipped classifier, and lists of words."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels
from maxlm.corpus.text import UNICODE, is_word, split_words_and_symbols

_SHIPPED = resources.files("maxlm.corpus") / "lists" / "toxic"


class ToxicityStage(PerDocumentStage):
    """Scores how offensive a text reads, by a small classifier of English and by lists
    of words.

    Labels, for thresholds and for a look at samples, not verdicts: the classifier knows
    single words only (it is 0.998 sure of "dick van dyke"), and a list knows no context
    (medicine, law, a novel). C4 dropped every page with one listed word, and lost much
    that was written by and about minorities (arXiv 2104.08758): a ratio is the better
    rule.

    - `score`: the chance that the text is offensive, the mean over chunks; `max_score`:
      that of the worst chunk. From alt-profanity-check: TF-IDF of words and a
      calibrated linear SVM, trained on 200,000 English comments. Null without the
      classifier, or for a text without characters.
    - `words`: how many listed words and phrases occur; `word_ratio`: for each word of
      the text, null without any. Words are those of the heuristics stage, upper and
      lower case are the same, and in scripts without spaces a listed word is found
      anywhere.

    The classifier's model is a pickle, and loading one runs code: only the two files
    that are installed with the package are ever loaded, and there is no setting for
    another.
    """

    stage: Literal["toxicity"] = "toxicity"
    classifier: bool = True
    """Whether to give `score` and `max_score`, which takes most of the time."""
    lists: tuple[str, ...] = ("en",)
    """Lists of words: the shipped `en`, `de`, `es`, `fr`, or paths of files with a word
    or phrase a line (`#` begins a comment line). A text's language does not matter:
    give a language its own stage, with `name` and `where`, if its words are harmless in
    others."""
    chunk: int = Field(default=2000, ge=100)
    """Characters that the classifier judges at once; a text is cut into parts of about
    as many."""
    longest: int = Field(default=1 << 20, ge=1)
    """Characters of a text to look at."""
    label_types: ClassVar[LabelTypes] = {
        "score": pa.float32(),
        "max_score": pa.float32(),
        "words": pa.int32(),
        "word_ratio": pa.float64(),
    }
    version: ClassVar[int] = 3
    packages: ClassVar[tuple[str, ...]] = ("regex",)

    def list_packages(self) -> tuple[str, ...]:
        """The classifier is a pickle of its package's, which need not be there without
        it."""
        if not self.classifier:
            return self.packages
        return ("alt-profanity-check", "scikit-learn", *self.packages)

    def fingerprint(self) -> str:
        """Hashes the lists' content too."""
        content = repr(read_word_lists(self.lists))
        parts = f"{super().fingerprint()} {UNICODE} {content}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def make_row_label_fn(self) -> RowLabelFn:
        phrases = _index_phrases(read_word_lists(self.lists))
        predict = None
        if self.classifier:
            from profanity_check import predict_prob as predict

        def label(text: str | None) -> RowLabels:
            text = (text or "")[: self.longest]
            num_listed, num_words = _count_listed(text, phrases)
            labels: dict[str, object] = {
                "words": num_listed,
                "word_ratio": num_listed / num_words if num_words else None,
            }
            if predict is not None and text:
                scores = predict(list(chunk_text(text, self.chunk)))
                labels["score"] = scores.mean()
                labels["max_score"] = scores.max()
            return labels

        return label


def chunk_text(text: str, max_characters: int) -> Iterator[str]:
    """Cuts a text into about equal parts, at spaces where one is near."""
    num_parts = -(-len(text) // max_characters)  # Rounded up.
    start = 0
    for part in range(1, num_parts + 1):
        stop = len(text) * part // num_parts
        if part < num_parts:
            space = text.rfind(" ", max(start, stop - max_characters // 4), stop)
            if space > start:
                stop = space
        yield text[start:stop]
        start = stop


def read_word_lists(names: Sequence[str]) -> tuple[str, ...]:
    """Reads the words and phrases of lists, shipped ones by name or files by path."""
    phrases: dict[str, None] = {}  # An ordered set.
    for name in names:
        path = _SHIPPED / f"{name}.txt" if name.isalpha() else Path(name)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            shipped = sorted(Path(file.name).stem for file in _SHIPPED.iterdir())
            message = f"cannot read the list {name!r} ({error})"
            fix = f"give a file of words, or one of: {', '.join(shipped)}"
            raise MaxlmError(message, fix=fix) from error
        for line in lines:
            phrase = line.strip()
            is_comment = line.startswith("#")
            if phrase and not is_comment:
                phrases[phrase] = None
    return tuple(phrases)


def _count_listed(
    text: str, phrases: Mapping[str, Sequence[list[str]]]
) -> tuple[int, int]:
    """Counts listed phrases from the start, the longest at each place; and the words of
    a text. `phrases`: as `_index_phrases` returns them."""
    tokens = split_words_and_symbols(text.lower())
    num_listed = 0
    end = 0  # Of the phrases counted: they do not overlap.
    for start, token in enumerate(tokens):
        if start < end:
            continue
        for phrase in phrases.get(token, ()):
            if tokens[start : start + len(phrase)] == phrase:
                num_listed += 1
                end = start + len(phrase)
                break
    return num_listed, sum(map(is_word, tokens))


def _index_phrases(phrases: Sequence[str]) -> dict[str, list[list[str]]]:
    """Returns phrases as tokens in lower case, by their first token, the longest
    first."""
    tokenized = [split_words_and_symbols(phrase.lower()) for phrase in phrases]
    by_first_token: dict[str, list[list[str]]] = {}
    for tokens in sorted(tokenized, key=len, reverse=True):
        if tokens:
            by_first_token.setdefault(tokens[0], []).append(tokens)
    return by_first_token
