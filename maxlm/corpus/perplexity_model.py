"""N-gram models that tell how far a text is from good prose (CCNet, arXiv 1911.00359).

A model is a file of KenLM's, ARPA or binary; or a folder that training or calibration
wrote: that file, and `cutoffs.json` with the rules by which its lines were made and the
perplexities that part head, middle and tail.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydantic import Field, ValidationError, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.corpus.kneser_ney import (
    KneserNeyConfig,
    KneserNeyReport,
    estimate_kneser_ney,
)
from maxlm.corpus.stage import check_packages
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter
from maxlm.runtime.files import convert_write_errors, hash_file, replace_file

TRAIN_FIX = "train a model: maxlm corpus train-perplexity TEXT... --out FOLDER"
"""What to do without a model, for errors."""
CUTOFFS_FILE = "cutoffs.json"
_SHOWN_PERCENTILES = (5, 10, 25, 50, 75, 90, 95)
_FEWEST_DOCUMENTS = 20  # Whose thirds mean something.


class PerplexityCalibrationConfig(Config):
    """Settings of the calibration of a perplexity model."""

    words: LineSplitterConfig = LineSplitterConfig()
    """Rules by which texts become the lines of words that the model knows."""
    percentiles: tuple[float, float] = (100 / 3, 200 / 3)
    """Percentiles of the reference's perplexities where head ends and where tail
    begins. CCNet's code has 30 and 60."""
    reference_documents: int = Field(default=10_000, ge=_FEWEST_DOCUMENTS)
    """Documents of the reference that are read, at most."""

    @model_validator(mode="after")
    def _check_percentiles(self) -> "PerplexityCalibrationConfig":
        if not 0 <= self.percentiles[0] <= self.percentiles[1] <= 100:
            raise ValueError("percentiles must rise within 0 and 100")
        return self


class PerplexityTrainingConfig(PerplexityCalibrationConfig):
    """Settings of the training of a perplexity model."""

    ngrams: KneserNeyConfig = KneserNeyConfig()
    hold_out: int = Field(default=20, ge=2)
    """Without a reference, one document in this many is one, and not trained on."""

    @model_validator(mode="after")
    def _check_order(self) -> "PerplexityTrainingConfig":
        if self.ngrams.order < 2:
            raise ValueError("KenLM opens no models of order 1")
        return self


class PerplexityMetadata(Config):
    """The content of `cutoffs.json`."""

    file: str
    """Name of the model's file, in the same folder."""
    model_sha256: str
    words: LineSplitterConfig
    cutoffs: tuple[float, float]
    """Perplexities: up to the first is head, beyond the second tail."""
    reference_documents: int
    """Documents that set the cutoffs."""
    percentiles: dict[int, float]
    """Percentiles of their perplexities, at 5, 10, 25, 50, 75, 90 and 95."""


@dataclass(frozen=True)
class PerplexityTrainingReport:
    """Figures of a training."""

    num_documents: int
    """Documents trained on."""
    ngrams: KneserNeyReport
    metadata: PerplexityMetadata


@dataclass(frozen=True)
class PerplexityModel:
    """A model, opened."""

    compute: Callable[[str], float | None]
    """Computes 10^(-log10 p / n) over a text's n words and line ends, each line a
    sentence; None for a text without words."""
    cutoffs: tuple[float, float] | None = None
    """Those of a model's folder; None: it is a file."""


def open_perplexity_model(path: Path, words: LineSplitterConfig) -> PerplexityModel:
    """Opens a model. `words`: of a file; a folder has its own. Raises MaxlmError: KenLM
    cannot read the model, or the folder has none."""
    if not path.is_dir():
        return PerplexityModel(_load_kenlm(path, words))
    metadata = read_perplexity_metadata(path)
    compute = _load_kenlm(path / metadata.file, metadata.words)
    return PerplexityModel(compute, metadata.cutoffs)


def _load_kenlm(path: Path, words: LineSplitterConfig) -> Callable[[str], float | None]:
    """Returns `PerplexityModel.compute` of a file of KenLM's."""
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        compute_log10_probability = kenlm.Model(str(path), config).score
    except OSError as error:
        message = f"KenLM cannot read this model: {error}"
        raise MaxlmError(message, where=str(path), fix=TRAIN_FIX) from error
    split_lines = make_line_splitter(words)

    def compute(text: str) -> float | None:
        log10_probability = 0.0
        num_tokens = 0
        for line in split_lines(text):
            log10_probability += compute_log10_probability(line)
            # One word more than spaces, and the line end.
            num_tokens += line.count(" ") + 2
        if num_tokens == 0:
            return None
        return 10 ** (-log10_probability / num_tokens)

    return compute


def read_perplexity_metadata(folder: Path) -> PerplexityMetadata:
    """Reads what a model's training or calibration recorded. Raises MaxlmError."""
    path = folder / CUTOFFS_FILE
    try:
        return PerplexityMetadata.model_validate_json(path.read_bytes())
    except OSError as error:
        message = f"there is no perplexity model in this folder: {error.strerror}"
        raise MaxlmError(message, where=str(path), fix=TRAIN_FIX) from error
    except ValidationError as error:
        message = f"this describes no perplexity model: {error.errors()[0]['msg']}"
        raise MaxlmError(message, where=str(path), fix=TRAIN_FIX) from error


def list_model_files(path: Path, words: LineSplitterConfig) -> list[Path]:
    """Lists all files that decide a model's perplexities; `words`: of a model that is a
    file.

    Raises MaxlmError: a folder without a model, or whose model is another one than its
    cutoffs were set for. OSError: the model cannot be read."""
    files = [path]
    if path.is_dir():
        metadata = read_perplexity_metadata(path)
        words = metadata.words
        model = path / metadata.file
        if hash_file(model) != metadata.model_sha256:
            message = f"{CUTOFFS_FILE} was written for another model"
            fix = (
                f"maxlm corpus calibrate-perplexity {model} --reference SAMPLE --out "
                f"{path}"
            )
            raise MaxlmError(message, where=str(model), fix=fix)
        files = [model, path / CUTOFFS_FILE]
    if words.tokenizer is not None:
        tokenizer_files = sorted(Path(words.tokenizer).iterdir())
        files += [file for file in tokenizer_files if file.is_file()]
    return files


def train_perplexity(
    texts: Iterable[str],
    folder: Path,
    config: PerplexityTrainingConfig | None = None,
    reference: Iterable[str] | None = None,
) -> PerplexityTrainingReport:
    """Trains a model on texts, sets its cutoffs and writes both to `folder`.

    A model that is there is replaced when all is done, and not before.

    Args:
        texts: documents of good prose in one language, read once, not stored.
        reference: documents whose perplexities set the cutoffs. CCNet takes the crawl
            that is to be filtered, so that each bucket gets a third of it. None:
            documents held out of `texts`, which makes "tail" all that is less likely
            than two thirds of good prose.

    Raises:
        MaxlmError: too few documents or words, the disk is full, or a package is
            missing.
    """
    check_packages(("kenlm-ex",), "training a perplexity model")
    config = config or PerplexityTrainingConfig()
    split_lines = make_line_splitter(config.words)
    held_out: list[str] = []
    num_documents = 0

    def read_sentences() -> Iterator[str]:
        nonlocal num_documents
        for number, text in enumerate(texts, 1):
            is_held_out = reference is None and number % config.hold_out == 0
            if is_held_out and len(held_out) < config.reference_documents:
                held_out.append(text)
            else:
                num_documents += 1
                yield from split_lines(text)

    with _make_scratch_folder(folder) as scratch:
        model = scratch / "model.arpa"
        ngrams = estimate_kneser_ney(read_sentences(), model, config.ngrams)
        metadata = _calibrate(
            model, held_out if reference is None else reference, config
        )
        _replace_model(folder, model, metadata)
    return PerplexityTrainingReport(num_documents, ngrams, metadata)


def calibrate_perplexity(
    model: Path,
    reference: Iterable[str],
    folder: Path,
    config: PerplexityCalibrationConfig | None = None,
) -> PerplexityMetadata:
    """Sets a model's cutoffs by a sample, and writes both to `folder`.

    Args:
        model: an ARPA or binary file of KenLM, of lines that `config.words` makes; or
            the folder of a model, whose rules for lines are used.
        reference: documents whose perplexities set the cutoffs, see `train_perplexity`.
        folder: may be that of the model.

    Raises:
        MaxlmError: KenLM cannot read the model, too few documents, the disk is full, or
            a package is missing.
    """
    check_packages(("kenlm-ex",), "calibrating a perplexity model")
    config = config or PerplexityCalibrationConfig()
    if model.is_dir():
        old = read_perplexity_metadata(model)
        config = config.model_copy(update={"words": old.words})
        model = model / old.file
    metadata = _calibrate(model, reference, config)
    with _make_scratch_folder(folder) as scratch:
        copy = scratch / metadata.file
        with convert_write_errors(copy):
            shutil.copyfile(model, copy)
        _replace_model(folder, copy, metadata)
    return metadata


def _calibrate(
    model: Path, reference: Iterable[str], config: PerplexityCalibrationConfig
) -> PerplexityMetadata:
    """Sets the cutoffs of a file of KenLM's."""
    compute = _load_kenlm(model, config.words)
    perplexities = []
    for text in islice(reference, config.reference_documents):
        perplexity = compute(text)
        if perplexity is not None:
            perplexities.append(perplexity)
    if len(perplexities) < _FEWEST_DOCUMENTS:
        message = f"{len(perplexities)} documents are too few to set cutoffs by"
        fix = f"give {_FEWEST_DOCUMENTS} or more with --reference"
        raise MaxlmError(message, fix=fix)
    low, high = np.percentile(perplexities, config.percentiles).tolist()
    shown = np.percentile(perplexities, _SHOWN_PERCENTILES).tolist()
    return PerplexityMetadata(
        file=f"model{model.suffix}",
        model_sha256=hash_file(model),
        words=config.words,
        cutoffs=(low, high),
        reference_documents=len(perplexities),
        percentiles=dict(zip(_SHOWN_PERCENTILES, shown, strict=True)),
    )


@contextmanager
def _make_scratch_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder, and in it one for what is not done, which is deleted at the
    end."""
    is_new = not folder.exists()
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(prefix=".", dir=folder)
    try:
        with scratch as name:
            yield Path(name)
    except BaseException:
        if is_new:
            folder.rmdir()
        raise


def _replace_model(folder: Path, model: Path, metadata: PerplexityMetadata) -> None:
    """Moves a model into a folder; while it has none of its cutoffs it is not taken for
    whole."""
    with convert_write_errors(folder):
        (folder / CUTOFFS_FILE).unlink(missing_ok=True)
        os.replace(model, folder / metadata.file)
        with replace_file(folder / CUTOFFS_FILE) as new:
            new.write_text(metadata.model_dump_json(indent=2) + "\n")
