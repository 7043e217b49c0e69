"""Scores how much a text is like the good examples of a trained classifier.

The classifier is scikit-learn's logistic regression on hashed words and n-grams. Its
score is calibrated to a probability (Platt) on documents that training did not see, and
measured on others that neither saw.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maxlm.config import Config, MaxlmError
from maxlm.corpus.stage import (
    LabelTypes,
    PerDocumentStage,
    RowLabelFn,
    RowLabels,
    check_packages,
)
from maxlm.corpus.text import WORD_PATTERN
from maxlm.data.documents.document import is_heldout
from maxlm.runtime.files import convert_write_errors, replace_file

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TRAIN = "maxlm corpus train-quality"
"""The command that makes a model."""
_BATCH = 1024  # Texts whose features are computed at a time.
_PARTS = ("train", "calibrate", "measure")
_CONFLICT = -1  # In place of a part.
_LONGEST = 1 << 20  # Characters of a text that are looked at.


class ClassifierConfig(Config):
    """The features of a classifier, and how its examples are used."""

    buckets: int = Field(default=20, ge=8, le=30)
    """Weights, as a power of two: words and n-grams share them by hash. 20 are 4 MB."""
    word_ngrams: int = Field(default=2, ge=1, le=5)
    """The longest n-gram of words and symbols; upper and lower case are the same."""
    char_ngrams: int = Field(default=0, ge=0, le=8)
    """Length of the character n-grams within what lies between spaces; 0: none. For
    short texts and languages with many word forms; about three times as slow."""
    heldout: float = Field(default=0.2, gt=0, lt=1)
    """Share of the documents held out, by a hash of the text: one half to calibrate and
    find the threshold, the other to measure."""
    target: Literal["precision", "recall"] = "precision"
    """The measure that the suggested threshold shall reach, with as much as can be of
    the other."""
    target_value: float = Field(default=0.9, gt=0, le=1)
    """Value of `target` to reach."""


@dataclass(frozen=True)
class ClassifierReport:
    """Measures of a classifier on documents that neither training nor calibration
    saw."""

    trained: tuple[int, int]
    """Documents it was trained on: positive, negative."""
    measured: tuple[int, int]
    conflicts: int
    """Documents left out because they are among both."""
    roc_auc: float
    """The chance that a positive document scores above a negative one, ties half."""
    brier: float
    """Mean squared error of the probabilities."""
    threshold: float
    """The suggested threshold, found on the calibration documents."""
    reached: bool
    """Whether the threshold reaches its target there."""
    target: str
    """The target, in words."""
    precision: float
    recall: float
    """Recall at `threshold`, as is `precision`."""

    def __str__(self) -> str:
        missed = "" if self.reached else " (NOT reached on the calibration documents)"
        lines = [
            "trained on   {} positive, {} negative documents".format(*self.trained),
            "measured on  {} positive, {} negative, held out".format(*self.measured),
            f"ROC AUC      {self.roc_auc:.4f}",
            f"Brier        {self.brier:.4f}",
            f"threshold    {self.threshold:.3f}, for {self.target}{missed}",
            f"  precision  {self.precision:.4f}",
            f"  recall     {self.recall:.4f}",
        ]
        if self.conflicts:
            lines.insert(2, f"left out     {self.conflicts} that are among both")
        return "\n".join(lines)


class _ClassifierNumbers(BaseModel):
    """Numbers of a classifier, see `Classifier`."""

    scale: float
    offset: float
    threshold: float


class _ClassifierMetadata(BaseModel):
    """The metadata of a classifier's file, in which each entry is JSON."""

    settings: Annotated[ClassifierConfig, BeforeValidator(json.loads)]
    numbers: Annotated[_ClassifierNumbers, BeforeValidator(json.loads)]


@dataclass(frozen=True)
class Classifier:
    """A trained model."""

    settings: ClassifierConfig
    weights: np.ndarray
    """One for each bucket: float32 [2**buckets], twice as many with `char_ngrams`."""
    scale: float
    offset: float
    """The probability is sigmoid(scale * features @ weights + offset)."""
    threshold: float
    """The suggested one."""

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Predicts the probability of each text to be a positive one, by its first 2^20
        characters: float64 [texts]; not a number for a text without words."""
        from scipy.special import expit

        features = _make_features(texts, self.settings)
        scores = self.scale * (features @ self.weights.astype(np.float64)) + self.offset
        has_words = np.diff(features.indptr) > 0
        return np.where(has_words, expit(scores), np.nan)

    def save(self, path: Path) -> None:
        """Writes a .safetensors file: the weights, and all else as JSON in its
        metadata."""
        numbers = {
            "scale": self.scale,
            "offset": self.offset,
            "threshold": self.threshold,
        }
        metadata = {
            "settings": self.settings.model_dump_json(),
            "numbers": json.dumps(numbers),
        }
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as new:
            new.write_bytes(save({"weights": self.weights}, metadata))


def load_classifier(path: Path) -> Classifier:
    """Reads a file that `Classifier.save` wrote."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = _ClassifierMetadata.model_validate(file.metadata() or {})
            settings = metadata.settings
            weights = file.get_tensor("weights")
        num_weights = (1 << settings.buckets) * (2 if settings.char_ngrams else 1)
        if weights.shape != (num_weights,) or weights.dtype != np.float32:
            raise ValueError(f"weights {weights.dtype}{weights.shape}")
    except (OSError, SafetensorError, ValueError) as error:
        fix = f"train one: {TRAIN} (see its --help)"
        raise MaxlmError(f"{path} holds no classifier ({error})", fix=fix) from error
    return Classifier(
        settings=settings,
        weights=weights,
        scale=metadata.numbers.scale,
        offset=metadata.numbers.offset,
        threshold=metadata.numbers.threshold,
    )


def train_classifier(
    positive: Iterable[bytes], negative: Iterable[bytes], settings: ClassifierConfig
) -> tuple[Classifier, ClassifierReport]:
    """Trains, calibrates and measures a classifier of texts in UTF-8.

    Memory is about three times the text. A text that comes several times counts as
    often, all on the same side of the split; one that is among both kinds is left out.
    Both kinds weigh the same in training, whatever their numbers; calibration undoes
    it. Raises MaxlmError: too few documents of one kind in one of the three parts; no
    scikit-learn."""
    check_packages(("scikit-learn",), "training a quality classifier")
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import (
        brier_score_loss,
        precision_score,
        recall_score,
        roc_auc_score,
    )

    examples = _read_examples(positive, negative, settings)
    _check_parts(examples, settings)
    features = examples.features
    labels = examples.labels
    trained = examples.parts == _PARTS.index("train")
    calibrated = examples.parts == _PARTS.index("calibrate")
    measured = examples.parts == _PARTS.index("measure")

    model = LogisticRegression(class_weight="balanced", C=10, max_iter=1000)
    model.fit(features[trained], labels[trained])
    weights = model.coef_[0].astype(np.float32)
    # As float64, as `Classifier.predict_proba` has it.
    scores = np.asarray(features @ weights.astype(np.float64))

    # Platt's calibration: a logistic regression of the score alone.
    platt = LogisticRegression(C=100)
    platt.fit(scores[calibrated, None], labels[calibrated])
    scale = float(np.asarray(platt.coef_)[0, 0])
    offset = float(np.asarray(platt.intercept_)[0])
    probabilities = expit(scale * scores + offset)
    threshold, is_reached = choose_threshold(
        probabilities[calibrated],
        labels[calibrated],
        settings.target,
        settings.target_value,
    )

    truth = labels[measured]
    measured_probabilities = probabilities[measured]
    is_taken = measured_probabilities >= threshold
    precision = precision_score(truth, is_taken, zero_division=1.0)  # pyright: ignore
    report = ClassifierReport(
        trained=(int(labels[trained].sum()), int((~labels[trained]).sum())),
        measured=(int(truth.sum()), int((~truth).sum())),
        conflicts=int(np.count_nonzero(examples.parts == _CONFLICT)),
        roc_auc=float(roc_auc_score(truth, measured_probabilities)),
        brier=float(brier_score_loss(truth, measured_probabilities)),
        threshold=threshold,
        reached=is_reached,
        target=f"{settings.target} {settings.target_value:g}",
        precision=float(precision),
        recall=float(recall_score(truth, is_taken)),
    )
    return Classifier(settings, weights, scale, offset, threshold), report


@dataclass(frozen=True)
class _Examples:
    """Documents that a classifier learns from; arrays have an entry for each."""

    features: "csr_array"
    """See `_make_features`."""
    labels: np.ndarray
    """Whether it is a positive example: bool."""
    parts: np.ndarray
    """Its part, by its place in `_PARTS`; `_CONFLICT`: it is among both kinds; int8."""


def _read_examples(
    positive: Iterable[bytes], negative: Iterable[bytes], settings: ClassifierConfig
) -> _Examples:
    from scipy.sparse import csr_array, vstack

    features = []
    kinds = []
    parts = []
    digests = []
    for kind, texts in ((True, iter(positive)), (False, iter(negative))):
        while batch := list(islice(texts, _BATCH)):
            decoded = [text.decode("utf-8", "replace") for text in batch]
            features.append(_make_features(decoded, settings))
            for text in batch:
                kinds.append(kind)
                parts.append(_choose_part(text, settings.heldout))
                digests.append(hashlib.sha256(text).digest()[:8])
    labels = np.array(kinds, bool)
    part_of_text = np.array(parts, np.int8)
    ids = np.array(digests, "S8")
    is_conflict = np.isin(ids, np.intersect1d(ids[labels], ids[~labels]))
    part_of_text[is_conflict] = _CONFLICT
    return _Examples(csr_array(vstack(features, format="csr")), labels, part_of_text)


def _choose_part(text: bytes, heldout: float) -> int:
    """Returns the place in `_PARTS` of the part that a text belongs to."""
    if not is_heldout(text, heldout):
        return _PARTS.index("train")
    # Those of the smaller share are among those of the larger.
    if not is_heldout(text, heldout / 2):
        return _PARTS.index("calibrate")
    return _PARTS.index("measure")


def choose_threshold(
    scores: np.ndarray, labels: np.ndarray, target: str, target_value: float
) -> tuple[float, bool]:
    """Finds the score that reaches a precision or recall as threshold and has most of
    the other; and whether it reaches `target_value`, or only comes closest."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    # The last point has no threshold.
    precision = precision[:-1]
    recall = recall[:-1]
    if target == "precision":
        target_measure = precision
        other_measure = recall
    else:
        target_measure = recall
        other_measure = precision
    is_reached = target_measure >= target_value
    if not is_reached.any():
        closest = np.argmax(target_measure)
        return float(thresholds[closest]), False
    # Of those with most of the other measure the one with most of the target's.
    worst_first = np.lexsort((target_measure, np.where(is_reached, other_measure, -1)))
    best = worst_first[-1]
    return float(thresholds[best]), True


def _make_features(texts: Sequence[str], settings: ClassifierConfig) -> "csr_array":
    """Hashes the n-grams of texts: a sparse matrix [texts, weights] with rows of norm
    1."""
    from scipy.sparse import csr_array, hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    num_buckets = 1 << settings.buckets
    heads = [text[:_LONGEST] for text in texts]
    word_vectorizer = HashingVectorizer(
        n_features=num_buckets,
        ngram_range=(1, settings.word_ngrams),
        token_pattern=WORD_PATTERN,
    )
    word_features = word_vectorizer.transform(heads)
    if not settings.char_ngrams:
        return csr_array(word_features)
    character_vectorizer = HashingVectorizer(
        n_features=num_buckets,
        ngram_range=(settings.char_ngrams, settings.char_ngrams),
        analyzer="char_wb",
    )
    character_features = character_vectorizer.transform(heads)
    return csr_array(hstack([word_features, character_features], format="csr"))


def _check_parts(examples: _Examples, settings: ClassifierConfig) -> None:
    """Checks that there are examples of both kinds in each part."""
    for kind, is_of_kind in (
        ("positive", examples.labels),
        ("negative", ~examples.labels),
    ):
        for number, part in enumerate(_PARTS):
            if not np.any(is_of_kind & (examples.parts == number)):
                message = (
                    f"{is_of_kind.sum()} {kind} documents: none of them falls to the "
                    f"part to {part}"
                )
                fix = (
                    "give more documents, or raise heldout (it is "
                    f"{settings.heldout:g})"
                )
                raise MaxlmError(message, fix=fix)


class QualityStage(PerDocumentStage):
    """Gives the probability that a text is one of the positive examples a classifier
    was trained on (`maxlm.corpus.stages.quality`; the idea is GPT-3's, arXiv
    2005.14165, appendix A).

    `score` is calibrated to the share of positive ones among the examples. Where that
    is another than in the corpus, its order stays right and its height does not. Null
    without any words.
    """

    stage: Literal["quality"] = "quality"
    model: Path
    """The classifier's file, as `maxlm corpus train-quality` writes it."""
    label_types: ClassVar[LabelTypes] = {"score": pa.float32()}
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = ("scikit-learn", "safetensors")
    files_fix: ClassVar[str] = f"train one: {TRAIN}"

    def list_input_files(self) -> Iterable[Path]:
        return (self.model,)

    def make_row_label_fn(self) -> RowLabelFn:
        model = load_classifier(self.model)

        def label(text: str) -> RowLabels:
            score = model.predict_proba([text])[0]
            return {} if np.isnan(score) else {"score": score}

        return label
