"""Measures how far a text is from good prose, by an n-gram model (CCNet, arXiv 1911.00359).

A model is a folder: `model.kenlm`, an ARPA or binary file that KenLM reads, and `cutoffs.json` with
the settings of its words and the perplexities that part head, middle and tail.
"""

import hashlib
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.corpus.stage import PerDocumentStage, check_packages
from maxlm.corpus.text import UNICODE, LineSplitter, LineSplitterConfig, make_line_splitter
from maxlm.runtime.files import convert_write_errors, hash_file, replace_file

CALIBRATE = "maxlm corpus calibrate-perplexity MODEL --reference DOCUMENTS --out FOLDER"
"""The command that writes a model's folder."""
MODEL = "model.kenlm"
CUTOFFS = "cutoffs.json"
_SHOWN = (5, 10, 25, 50, 75, 90, 95)
_FEWEST = 20  # Documents whose thirds mean something.


class PerplexityConfig(Config):
    """Settings of a perplexity model's calibration."""

    words: LineSplitterConfig = LineSplitterConfig()
    percentiles: tuple[float, float] = (100 / 3, 200 / 3)
    """Percentiles of the reference's perplexities where head ends and where tail begins. CCNet's
    code has 30 and 60."""
    reference_documents: int = Field(default=10_000, ge=_FEWEST)
    """The most documents that are read of the reference."""

    @model_validator(mode="after")
    def _check(self) -> "PerplexityConfig":
        if not 0 <= self.percentiles[0] <= self.percentiles[1] <= 100:
            raise ValueError("percentiles must rise within 0 and 100")
        return self


@dataclass(frozen=True)
class PerplexityModel:
    """A model, opened."""

    split_lines: LineSplitter
    log10_prob: Callable[[str], float]
    """log10 of a line's probability, its end included."""
    cutoffs: tuple[float, float] = (0.0, 0.0)

    def perplexity(self, text: str) -> float | None:
        """Computes 10^(-log10 p / n) over a text's n words and line ends, each line a sentence.

        None for a text without words.
        """
        total, number = 0.0, 0
        for line in self.split_lines(text):
            total += self.log10_prob(line)
            number += line.count(" ") + 2
        return 10 ** (-total / number) if number else None


def open_model(folder: Path) -> PerplexityModel:
    """Raises: MaxlmError: see `read_perplexity_metadata`; KenLM cannot read the model."""
    kept = read_perplexity_metadata(folder)
    return PerplexityModel(make_line_splitter(kept.words), _load(folder / MODEL), kept.cutoffs)


def _load(path: Path) -> Callable[[str], float]:
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        return kenlm.Model(str(path), config).score
    except OSError as error:
        raise _make_model_error(path, str(error)) from error


class PerplexityMetadata(Config):
    """The content of `cutoffs.json`."""

    cutoffs: tuple[float, float]
    """Perplexities: up to the first is head, beyond the second tail."""
    words: LineSplitterConfig
    model_sha256: str
    documents: int
    """Documents in the reference."""
    percentiles: dict[int, float]
    """Percentiles of the reference's perplexities, at 5, 10, 25, 50, 75, 90 and 95."""


def read_perplexity_metadata(folder: Path) -> PerplexityMetadata:
    """Reads what a model's calibration recorded."""
    path = folder / CUTOFFS
    try:
        return PerplexityMetadata.model_validate_json(path.read_bytes())
    except OSError as error:
        what = f"there is no perplexity model: {error.strerror}"
        raise MaxlmError(what, where=str(path), fix=f"write one: {CALIBRATE}") from error
    except ValidationError as error:
        raise _make_model_error(path, str(error)) from error


def hash_model(folder: Path) -> str:
    """Hashes all that decides a model's perplexities: its files and its tokenizer's."""
    kept, path = read_perplexity_metadata(folder), folder / MODEL
    if not path.is_file() or hash_file(path) != kept.model_sha256:
        raise _make_model_error(path, f"it is not the one that {CUTOFFS} was written for")
    parts = [kept.model_dump_json()]
    if kept.words.tokenizer is not None:
        from maxlm.data.tokenizer import load_tokenizer

        parts.append(load_tokenizer(kept.words.tokenizer).fingerprint)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make_model_error(path: Path, reason: str) -> MaxlmError:
    what = f"cannot read the perplexity model: {reason}"
    fix = f"train a model with KenLM's lmplz, then: {CALIBRATE}"
    return MaxlmError(what, where=str(path), fix=fix)


def choose_bucket(perplexity: float, cutoffs: tuple[float, float]) -> str:
    """Returns the third of the reference that a perplexity falls into."""
    return ("head", "middle", "tail")[bisect_left(cutoffs, perplexity)]


def calibrate_perplexity(
    model_path: Path,
    reference: Iterable[str],
    folder: Path,
    config: PerplexityConfig | None = None,
) -> PerplexityMetadata:
    """Sets a model's cutoffs and writes both to `folder`, for `PerplexityStage`.

    Args:
        model_path: an ARPA or binary file of KenLM, of lines that `config.words` makes.
        reference: documents whose perplexities set the cutoffs. CCNet takes the crawl that is to
            be filtered, so that each bucket gets a third of it.

    Raises:
        MaxlmError: KenLM cannot read the model, too few documents, the disk is full, or a package
            is missing.
    """
    check_packages(("kenlm-ex",), "calibrating a perplexity model")
    config = config or PerplexityConfig()
    model = PerplexityModel(make_line_splitter(config.words), _load(model_path))
    scores = map(model.perplexity, islice(reference, config.reference_documents))
    perplexities = np.array([score for score in scores if score is not None])
    if len(perplexities) < _FEWEST:
        what = f"{len(perplexities)} documents are too few to set cutoffs by"
        raise MaxlmError(what, fix=f"give {_FEWEST} or more as reference")
    low, high = np.percentile(perplexities, config.percentiles)
    metadata = PerplexityMetadata(
        cutoffs=(float(low), float(high)),
        words=config.words,
        model_sha256=hash_file(model_path),
        documents=len(perplexities),
        percentiles={p: float(np.percentile(perplexities, p)) for p in _SHOWN},
    )
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / MODEL) as new:
            shutil.copyfile(model_path, new)
        with replace_file(folder / CUTOFFS) as new:
            new.write_text(metadata.model_dump_json(indent=2) + "\n")
    return metadata


ANY = "*"
"""The key in `models` for every language that is not named."""


class PerplexityStage(PerDocumentStage):
    """Perplexity under an n-gram model of KenLM, and CCNet's buckets (arXiv 1911.00359).

    The models' folders are those of `maxlm corpus calibrate-perplexity`. Low is not always good:
    repetition and boilerplate are unsurprising too.

    Labels: `value`, the perplexity by word, line ends counted; `bucket`, "head", "middle" or
    "tail" by the model's cutoffs. Both are null where there is no model for the language, or not
    one word.
    """

    stage: Literal["perplexity"] = "perplexity"
    models: dict[str, Path] = Field(min_length=1)
    """The folder of each language's model. Under "*": of all languages that are not named."""
    cutoffs: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Perplexities where head ends and tail begins, by language, in place of the model's."""
    language: str | None = "language.name"
    """The label that tells a document's language; null: all documents go by the model "*"."""

    version: ClassVar[int] = 3
    required_packages: ClassVar[tuple[str, ...]] = ("kenlm-ex",)

    @model_validator(mode="after")
    def _check(self) -> "PerplexityStage":
        if self.language is None and set(self.models) != {ANY}:
            raise ValueError(f'without a language label, models must be {{"{ANY}": FOLDER}}')
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
        """Hashes the models' content too."""
        contents = map(hash_model, self.models.values())
        parts = "\n".join([super().fingerprint(), UNICODE, *contents])
        return hashlib.sha256(parts.encode()).hexdigest()

    def make_row_label_fn(self) -> Callable[..., dict[str, Any]]:
        """Reads models when the first document in their language comes."""
        for folder in self.models.values():
            read_perplexity_metadata(folder)
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
