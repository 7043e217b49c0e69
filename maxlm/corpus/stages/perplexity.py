"""Measures how far a text is from good prose, by an n-gram model of KenLM."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.corpus.perplexity_model import (
    TRAIN_FIX,
    PerplexityModel,
    list_model_files,
    open_perplexity_model,
)
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, RowLabelFn, RowLabels
from maxlm.corpus.text import LineSplitterConfig

ANY = "*"
"""The key in `models` for every language that is not named."""


class PerplexityStage(PerDocumentStage):
    """Perplexity under an n-gram model of KenLM, as in CCNet (arXiv 1911.00359).

    Low is not always good: repetition and boilerplate are unsurprising too.

    Labels: `value`, the perplexity by word, line ends counted; `bucket`, "head",
    "middle" or "tail" by the model's cutoffs or `cutoffs`, null without. Both are null
    where there is no model for the language, or not one word.
    """

    stage: Literal["perplexity"] = "perplexity"
    models: dict[str, Path] = Field(min_length=1)
    """Each language's model: a folder that `maxlm corpus train-perplexity` or
    `calibrate-perplexity` wrote; or an ARPA or binary file of KenLM, of lines that
    `words` makes. Under "*": of all languages that are not named."""
    words: LineSplitterConfig = LineSplitterConfig()
    """The rules by which the lines were made that models were trained on, of models
    that are files: a folder has its own."""
    cutoffs: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Perplexities where head ends and tail begins, by language, in place of those in
    the model's folder; CCNet has those that part a crawl in thirds."""
    language: str | None = "language.name"
    """The label that tells a document's language; null: all documents go by the model
    "*"."""

    label_types: ClassVar[LabelTypes] = {"value": pa.float64(), "bucket": pa.string()}
    version: ClassVar[int] = 4
    packages: ClassVar[tuple[str, ...]] = ("kenlm-ex",)
    depends_on_unicode: ClassVar[bool] = True
    files_fix: ClassVar[str] = TRAIN_FIX

    @model_validator(mode="after")
    def _check(self) -> "PerplexityStage":
        if self.language is None and set(self.models) != {ANY}:
            raise ValueError(
                f'without a language label, models must be {{"{ANY}": MODEL}}'
            )
        without_model = sorted(set(self.cutoffs) - set(self.models))
        if without_model:
            languages = ", ".join(without_model)
            raise ValueError(f"cutoffs for {languages}, which have no model")
        return self

    @property
    def input_labels(self) -> Mapping[str, Literal["numbers", "strings"]]:
        return {} if self.language is None else {self.language: "strings"}

    def list_input_files(self) -> Iterable[Path]:
        for path in self.models.values():
            yield from list_model_files(path, self.words)

    def make_row_label_fn(self) -> RowLabelFn:
        """Reads models when the first document in their language comes."""

        @cache
        def open_model(key: str) -> PerplexityModel:
            return open_perplexity_model(self.models[key], self.words)

        def label(text: str, language: str | None = None) -> RowLabels:
            key = language if language in self.models else ANY
            if key not in self.models:
                return {}
            model = open_model(key)
            value = model.compute(text)
            if value is None:
                return {}
            cutoffs = self.cutoffs.get(key, model.cutoffs)
            if cutoffs is None:
                return {"value": value}
            bucket = ("head", "middle", "tail")[bisect_left(cutoffs, value)]
            return {"value": value, "bucket": bucket}

        return label
