"""Measures how far a text is from good prose, by an n-gram model of KenLM."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter

ANY = "*"
"""The key in `models` for every language that is not named."""
_TRAIN = "train one with KenLM's lmplz"


def load_perplexity_model(path: Path, words: LineSplitterConfig) -> Callable[[str], float | None]:
    """Returns a function that computes 10^(-log10 p / n) over a text's n words and line ends, each
    line a sentence; None for a text without words."""
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        log10_prob = kenlm.Model(str(path), config).score
    except OSError as error:
        what = f"KenLM cannot read this model: {error}"
        raise MaxlmError(what, where=str(path), fix=_TRAIN) from error
    split_lines = make_line_splitter(words)

    def compute(text: str) -> float | None:
        total, number = 0.0, 0
        for line in split_lines(text):
            total += log10_prob(line)
            number += line.count(" ") + 2
        return 10 ** (-total / number) if number else None

    return compute


class PerplexityStage(PerDocumentStage):
    """Perplexity under an n-gram model of KenLM, as in CCNet (arXiv 1911.00359).

    Low is not always good: repetition and boilerplate are unsurprising too.

    Labels: `value`, the perplexity by word, line ends counted; `bucket`, "head", "middle" or
    "tail" by `cutoffs`, null without. Both are null where there is no model for the language, or
    not one word.
    """

    stage: Literal["perplexity"] = "perplexity"
    models: dict[str, Path] = Field(min_length=1)
    """Each language's model: an ARPA or binary file of KenLM, of lines that `words` makes. Under
    "*": of all languages that are not named."""
    words: LineSplitterConfig = LineSplitterConfig()
    """The rules by which the lines that models were trained on were made."""
    cutoffs: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Perplexities where head ends and tail begins, by language; CCNet has those that part a
    crawl in thirds."""
    language: str | None = "language.name"
    """The label that tells a document's language; null: all documents go by the model "*"."""

    label_types: ClassVar[LabelTypes] = {"value": pa.float64(), "bucket": pa.string()}
    version: ClassVar[int] = 4
    packages: ClassVar[tuple[str, ...]] = ("kenlm-ex",)
    depends_on_unicode: ClassVar[bool] = True
    files_fix: ClassVar[str] = _TRAIN

    @model_validator(mode="after")
    def _check(self) -> "PerplexityStage":
        if self.language is None and set(self.models) != {ANY}:
            raise ValueError(f'without a language label, models must be {{"{ANY}": FILE}}')
        if unknown := sorted(set(self.cutoffs) - set(self.models)):
            raise ValueError(f"cutoffs for {', '.join(unknown)}, which have no model")
        return self

    @property
    def input_labels(self) -> Mapping[str, Literal["numbers", "strings"]]:
        return {} if self.language is None else {self.language: "strings"}

    def list_input_files(self) -> Iterable[Path]:
        tokenizer = self.words.tokenizer
        files = sorted(Path(tokenizer).iterdir()) if tokenizer is not None else ()
        return [*self.models.values(), *(path for path in files if path.is_file())]

    def make_row_label_fn(self) -> Callable[..., dict[str, Any]]:
        """Reads models when the first document in their language comes."""
        load = cache(lambda key: load_perplexity_model(self.models[key], self.words))

        def label(text: str, language: str | None = None) -> dict[str, Any]:
            key = language if language in self.models else ANY
            if key not in self.models or (value := load(key)(text)) is None:
                return {}
            if key not in self.cutoffs:
                return {"value": value}
            bucket = ("head", "middle", "tail")[bisect_left(self.cutoffs[key], value)]
            return {"value": value, "bucket": bucket}

        return label
