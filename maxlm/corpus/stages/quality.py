"""Scores how much a text is like the good examples of a trained classifier.

The classifier is scikit-learn's logistic regression on hashed words and n-grams. Its
score is calibrated to a probability (Platt) on documents that training did not see, and
measured on others that neither saw.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maxlm.config import Config, MaxlmError
from maxlm.corpus.stage import LabelTypes, PerDocumentStage, check_packages
from maxlm.corpus.text import WORD_PATTERN
from maxlm.data.documents.document import is_heldout
from maxlm.runtime.files import convert_write_errors, replace_file

TRAIN = "maxlm corpus train-quality"
"""The command that makes a model."""
_BATCH = 1024
_PARTS = ("train", "calibrate", "measure")
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
        return np.where(np.diff(features.indptr) > 0, expit(scores), np.nan)

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
            metadata = file.metadata()
            settings = ClassifierConfig.model_validate_json(metadata["settings"])
            weights = file.get_tensor("weights")
            size = (1 << settings.buckets) * (2 if settings.char_ngrams else 1)
            if weights.shape != (size,) or weights.dtype != np.float32:
                raise ValueError(f"weights {weights.dtype}{weights.shape}")
            return Classifier(settings, weights, **json.loads(metadata["numbers"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        fix = f"train one: {TRAIN} (see its --help)"
        raise MaxlmError(f"{path} holds no classifier ({error})", fix=fix) from error


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
    rows, kinds, parts, digests = [], [], [], []
    for kind, texts in ((True, iter(positive)), (False, iter(negative))):
        while batch := list(islice(texts, _BATCH)):
            decoded = [text.decode("utf-8", "replace") for text in batch]
            rows.append(_make_features(decoded, settings))
            kinds += [kind] * len(batch)
            parts += [
                is_heldout(text, settings.heldout)
                + is_heldout(text, settings.heldout / 2)
                for text in batch
            ]
            digests += [hashlib.sha256(text).digest()[:8] for text in batch]
    labels, parts, ids = (
        np.array(kinds, bool),
        np.array(parts, np.int8),
        np.array(digests, "S8"),
    )
    both = np.isin(ids, np.intersect1d(ids[labels], ids[~labels]))
    parts[both] = -1
    _check_parts(parts, labels, settings)

    from scipy.sparse import vstack
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import (
        brier_score_loss,
        precision_score,
        recall_score,
        roc_auc_score,
    )

    features: Any = vstack(rows, format="csr")
    train, middle, last = (parts == part for part in range(len(_PARTS)))
    model = LogisticRegression(class_weight="balanced", C=10, max_iter=1000)
    weights = model.fit(features[train], labels[train]).coef_[0].astype(np.float32)
    scores = features @ weights.astype(np.float64)
    platt = LogisticRegression(C=100).fit(scores[middle, None], labels[middle])
    scale, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    scores = expit(scale * scores + offset)
    target = settings.target, settings.target_value
    threshold, reached = choose_threshold(scores[middle], labels[middle], *target)
    truth = labels[last]
    taken = scores[last] >= threshold
    report = ClassifierReport(
        trained=(int(labels[train].sum()), int((~labels[train]).sum())),
        measured=(int(truth.sum()), int((~truth).sum())),
        conflicts=int(both.sum()),
        roc_auc=float(roc_auc_score(truth, scores[last])),
        brier=float(brier_score_loss(truth, scores[last])),
        threshold=threshold,
        reached=reached,
        target=f"{settings.target} {settings.target_value:g}",
        precision=float(precision_score(truth, taken, zero_division=1.0)),  # pyright: ignore
        recall=float(recall_score(truth, taken)),
    )
    return Classifier(settings, weights, scale, offset, threshold), report


def choose_threshold(
    scores: np.ndarray, labels: np.ndarray, target: str, target_value: float
) -> tuple[float, bool]:
    """Finds the score that reaches a precision or recall as threshold and has most of
    the other; and whether it reaches `target_value`, or only comes closest."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    reaches, other = (
        (precision, recall) if target == "precision" else (recall, precision)
    )
    reaches, other = reaches[:-1], other[:-1]  # The last point has no threshold.
    reached = reaches >= target_value
    if not reached.any():
        return float(thresholds[np.argmax(reaches)]), False
    return float(
        thresholds[np.lexsort((reaches, np.where(reached, other, -1)))[-1]]
    ), True


def _make_features(texts: Sequence[str], settings: ClassifierConfig) -> Any:
    """Hashes the n-grams of texts: a sparse matrix [texts, weights] with rows of norm
    1."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    size = 1 << settings.buckets
    longest = settings.word_ngrams
    texts = [text[:_LONGEST] for text in texts]
    words = HashingVectorizer(
        n_features=size, ngram_range=(1, longest), token_pattern=WORD_PATTERN
    )
    found = words.transform(texts)
    if not settings.char_ngrams:
        return found
    ngram_range = (settings.char_ngrams, settings.char_ngrams)
    characters = HashingVectorizer(
        n_features=size, ngram_range=ngram_range, analyzer="char_wb"
    )
    return hstack([found, characters.transform(texts)], format="csr")


def _check_parts(
    parts: np.ndarray, labels: np.ndarray, settings: ClassifierConfig
) -> None:
    for kind, chosen in (("positive", labels), ("negative", ~labels)):
        for number, part in enumerate(_PARTS):
            if not np.any(chosen & (parts == number)):
                what = f"{chosen.sum()} {kind} documents: none of them falls to the part to {part}"
                fix = f"give more documents, or raise heldout (it is {settings.heldout:g})"
                raise MaxlmError(what, fix=fix)


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

    def make_row_label_fn(self) -> Callable[[str], dict[str, Any]]:
        model = load_classifier(self.model)

        def label(text: str) -> dict[str, Any]:
            score = model.predict_proba([text])[0]
            return {} if np.isnan(score) else {"score": score}

        return label
