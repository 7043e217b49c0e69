"""Measures how far a text is from good prose, by an n-gram model of KenLM."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.corpus.stage import PerDocumentStage
from maxlm.corpus.text import UNICODE, LineSplitterConfig, make_line_splitter
from maxlm.runtime.files import hash_file

ANY = "*"
"""The key in `models` for every language that is not named."""


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
        what, fix = f"KenLM cannot read this model: {error}", "train one with KenLM's lmplz"
        raise MaxlmError(what, where=str(path), fix=fix) from error
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

    version: ClassVar[int] = 4
    required_packages: ClassVar[tuple[str, ...]] = ("kenlm-ex",)

    @model_validator(mode="after")
    def _check(self) -> "PerplexityStage":
        if self.language is None and set(self.models) != {ANY}:
            raise ValueError(f'without a language label, models must be {{"{ANY}": FILE}}')
        if unknown := sorted(set(self.cutoffs) - set(self.models)):
            raise ValueError(f"cutoffs for {', '.join(unknown)}, which have no model")
        return self

    @property
    def input_columns(self) -> tuple[str, ...]:
        return ("text",) if self.language is None else ("text", self.language)

    @property
    def string_input_columns(self) -> tuple[str, ...]:
        """Labels it reads that must hold strings."""
        return self.input_columns[1:]

    def schema(self) -> pa.Schema:
        return pa.schema([("value", pa.float64()), ("bucket", pa.string())])

    def fingerprint(self) -> str:
        """Hashes the models' content too, and the tokenizer's."""
        parts = [super().fingerprint(), UNICODE]
        for path in self.models.values():
            if not path.is_file():
                fix = "train one with KenLM's lmplz"
                raise MaxlmError("there is no perplexity model", where=str(path), fix=fix)
            parts.append(hash_file(path))
        if self.words.tokenizer is not None:
            from maxlm.data.tokenizer import load_tokenizer

            parts.append(load_tokenizer(self.words.tokenizer).fingerprint)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

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
