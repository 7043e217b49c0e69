"""Signs of toxic and sexual text: a shipped classifier, and lists of words."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage
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
        own = ("alt-profanity-check", "scikit-learn") if self.classifier else ()
        return (*own, *self.packages)

    def fingerprint(self) -> str:
        """Hashes the lists' content too."""
        content = repr(read_word_lists(self.lists))
        return hashlib.sha256(
            f"{super().fingerprint()} {UNICODE} {content}".encode()
        ).hexdigest()

    def make_row_label_fn(self) -> Callable[[str | None], dict[str, Any]]:
        listed = _index_phrases(read_word_lists(self.lists))
        predict = None
        if self.classifier:
            from profanity_check import predict_prob as predict

        def label(text: str | None) -> dict[str, Any]:
            text = (text or "")[: self.longest]
            found, words = _count_listed(text, listed)
            labels = {"words": found, "word_ratio": found / words if words else None}
            if predict is None or not text:
                return labels
            scores = predict(list(chunk_text(text, self.chunk)))
            return labels | {"score": scores.mean(), "max_score": scores.max()}

        return label


def chunk_text(text: str, size: int) -> Iterator[str]:
    """Cuts a text into about equal parts of some `size` at most, at spaces where one is
    near."""
    number = -(-len(text) // size)
    start = 0
    for k in range(1, number + 1):
        stop = len(text) * k // number
        if k < number:
            space = text.rfind(" ", max(start, stop - size // 4), stop)
            stop = space if space > start else stop
        yield text[start:stop]
        start = stop


def read_word_lists(names: Sequence[str]) -> tuple[str, ...]:
    """Reads the words and phrases of lists, shipped ones by name or files by path."""
    phrases: dict[str, None] = {}
    for name in names:
        path = _SHIPPED / f"{name}.txt" if name.isalpha() else Path(name)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            shipped = sorted(Path(each.name).stem for each in _SHIPPED.iterdir())
            fix = f"give a file of words, or one of: {', '.join(shipped)}"
            raise MaxlmError(
                f"cannot read the list {name!r} ({error})", fix=fix
            ) from error
        phrases.update(
            dict.fromkeys(x.strip() for x in lines if x.strip() and x[0] != "#")
        )
    return tuple(phrases)


def _count_listed(
    text: str, listed: Mapping[str, Sequence[list[str]]]
) -> tuple[int, int]:
    """Counts listed phrases from the start, the longest at each place; and the words of
    a text. `listed`: phrases as tokens in lower case, by their first, the longest
    first."""
    tokens = split_words_and_symbols(text.lower())
    found = end = 0
    for i, token in enumerate(tokens):
        if i >= end and token in listed:
            for phrase in listed[token]:
                if tokens[i : i + len(phrase)] == phrase:
                    found, end = found + 1, i + len(phrase)
                    break
    return found, sum(map(is_word, tokens))


def _index_phrases(phrases: Sequence[str]) -> dict[str, list[list[str]]]:
    listed: dict[str, list[list[str]]] = {}
    split = (split_words_and_symbols(phrase.lower()) for phrase in phrases)
    for tokens in sorted(filter(None, split), key=len, reverse=True):
        listed.setdefault(tokens[0], []).append(tokens)
    return listed
