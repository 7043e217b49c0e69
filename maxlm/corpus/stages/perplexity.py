"""How surprising a text is to a model of good prose in its language."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from maxlm.corpus.perplexity import (
    PerplexityModel,
    choose_bucket,
    hash_model,
    open_model,
    read_cutoffs,
)
from maxlm.corpus.stage import LabelStage
from maxlm.corpus.text import UNICODE

ANY = "*"
"""In place of a language: every one that is not named."""


class PerplexityStage(LabelStage):
    """Perplexity under a 5-gram Kneser-Ney model, and CCNet's buckets (arXiv 1911.00359).

    The models are those of `maxlm corpus train-perplexity`. Low is not always good: repetition and
    boilerplate are unsurprising too.

    Labels: `value`, the perplexity by word, line ends counted; `bucket`, "head", "middle" or
    "tail" by the model's cutoffs. Both are null where there is no model for the language, or not
    one word.
    """

    stage: Literal["perplexity"] = "perplexity"
    models: dict[str, Path] = Field(min_length=1)
    """The folder of each language's model. Under "*": of all languages that are not named."""
    cutoffs: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """By language, the perplexities where head ends and tail begins, in place of the model's."""
    language: str | None = "language.name"
    """The label that tells a document's language; null: all documents go by the model "*"."""

    version: ClassVar[int] = 3

    @model_validator(mode="after")
    def _check(self) -> "PerplexityStage":
        if self.language is None and set(self.models) != {ANY}:
            raise ValueError(f'without a language label, models must be {{"{ANY}": FOLDER}}')
        if unknown := sorted(set(self.cutoffs) - set(self.models)):
            raise ValueError(f"cutoffs for {', '.join(unknown)}, which have no model")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The text and, if it matters, its language."""
        return ("text",) if self.language is None else ("text", self.language)

    @property
    def strings(self) -> tuple[str, ...]:
        """Labels it reads that must hold strings."""
        return self.reads[1:]

    def schema(self) -> pa.Schema:
        return pa.schema([("value", pa.float64()), ("bucket", pa.string())])

    def key(self) -> str:
        """Also of the models' content.

        Raises:
            MaxlmError: see `hash_model`.
        """
        contents = map(hash_model, self.models.values())
        return hashlib.sha256("\n".join([super().key(), UNICODE, *contents]).encode()).hexdigest()

    def packages(self) -> tuple[str, ...]:
        return ("kenlm-ex",)

    def open_row(self) -> Callable[..., dict[str, Any]]:
        """See `LabelStage`. Models are read when the first document in their language comes."""
        for folder in self.models.values():
            read_cutoffs(folder)
        opened: Callable[[Path], PerplexityModel] = cache(open_model)

        def label(text: str, language: str | None = None) -> dict[str, Any]:
            key = language if language in self.models else ANY
            if key not in self.models:
                return {}
            model = opened(self.models[key])
            if (value := model.perplexity(text)) is None:
                return {}
            bucket = choose_bucket(value, self.cutoffs.get(key, model.cutoffs))
            return {"value": value, "bucket": bucket}

        return label
