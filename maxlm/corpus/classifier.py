"""A linear classifier of texts: logistic regression on hashed words and pairs of words.

The model class of fastText (arXiv 1607.01759) without the embedding in between: a text's score is
the mean of a weight for each of its words and n-grams of words. Trained here by AdaGrad; the score
is calibrated to a probability (Platt) on documents that training did not see, and measured on
others that neither saw.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.corpus.characters import character_classes, lower_case
from maxlm.corpus.classifier_report import Report, sigmoid, suggest_threshold
from maxlm.corpus.compiled import compiled
from maxlm.corpus.textbuffers import pack_texts
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.heldout import is_heldout
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.files import replacing, writing

_BATCH = 1024
TRAIN = "maxlm corpus train-quality"
"""The command that makes a model."""


class ClassifierConfig(Config):
    """What a classifier looks at and how it is trained."""

    buckets: int = Field(default=20, ge=8, le=30)
    """Weights, as a power of two: words and n-grams share them by hash. 20 are 4 MB."""
    word_ngrams: int = Field(default=2, ge=1, le=5)
    """The longest n-gram of words and symbols; upper and lower case are the same."""
    char_ngrams: int = Field(default=0, ge=0, le=8)
    """Also n-grams of so many characters within what lies between spaces; 0: none. For short texts
    and languages with many word forms; about three times as slow."""
    epochs: int = Field(default=5, ge=1)
    """Passes over the documents."""
    learning_rate: float = Field(default=0.5, gt=0)
    """AdaGrad's."""
    heldout: float = Field(default=0.2, gt=0, lt=1)
    """Share of the documents held out, by a hash of the text: one half to calibrate and find the
    threshold, the other to measure."""
    target: Literal["precision", "recall"] = "precision"
    """What the suggested threshold is to reach, with as much as can be of the other."""
    target_value: float = Field(default=0.9, gt=0, le=1)
    """How much of it."""
    seed: int = 0
    """Seed of the order in which documents are trained on."""


class ClassifierTraining(Config):
    """A classifier and its examples."""

    positive: SourceConfig
    """Documents as they should be: a score near 1."""
    negative: SourceConfig
    """Documents as they should not be: a score near 0."""
    model: ClassifierConfig = ClassifierConfig()
    """What it looks at and how it is trained."""


@dataclass(frozen=True)
class Classifier:
    """A trained model."""

    settings: ClassifierConfig
    weights: np.ndarray
    """One for each bucket: float32 [2**buckets]."""
    scale: float
    offset: float
    """The probability is sigmoid(scale * mean weight + offset)."""
    threshold: float
    """The suggested one."""

    def predict(self, offsets: np.ndarray, data: np.ndarray) -> np.ndarray:
        """The probability of each text to be a positive one; not a number without any words.

        Args:
            offsets, data: as from `text_buffers`. Of a text the first MiB is looked at.

        Returns:
            float64 [texts].
        """
        tables = character_classes(), lower_case()
        ngrams = self.settings.word_ngrams, self.settings.char_ngrams
        means = compiled("classifier").mean_weights(offsets, data, *tables, *ngrams, self.weights)
        return sigmoid(self.scale * means + self.offset)

    def save(self, path: Path) -> None:
        """Write a .safetensors file: the weights, and all else as JSON in its metadata.

        Raises:
            MaxlmError: it cannot be written; safetensors is missing.
        """
        _require_safetensors(str(path))
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        numbers = {"scale": self.scale, "offset": self.offset, "threshold": self.threshold}
        metadata = {"settings": self.settings.model_dump_json(), "numbers": json.dumps(numbers)}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            try:
                save_file({"weights": self.weights}, new, metadata)
            except SafetensorError as error:
                raise OSError(str(error)) from error


def _require_safetensors(where: str | None) -> None:
    if importlib.util.find_spec("safetensors") is None:
        what = "classifiers are files of safetensors, which is not installed"
        raise MaxlmError(what, where=where, fix="pip install 'maxlm[corpus]'")


def load_classifier(path: Path, where: str | None = None) -> Classifier:
    """Read what `Classifier.save` wrote.

    Args:
        where: the config key it comes from, for errors.

    Raises:
        MaxlmError: there is no such file, or it is not a classifier's; safetensors is missing.
    """
    _require_safetensors(where)
    from safetensors import SafetensorError, safe_open

    fix = f"train one: {TRAIN} (see its --help)"
    if not path.is_file():
        raise MaxlmError(f"there is no classifier {path}", where=where, fix=fix)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            settings = ClassifierConfig.model_validate_json(metadata["settings"])
            weights = file.get_tensor("weights")
            if weights.shape != (1 << settings.buckets,) or weights.dtype != np.float32:
                raise ValueError(f"weights {weights.dtype}{weights.shape}")
            return Classifier(settings, weights, **json.loads(metadata["numbers"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MaxlmError(f"{path} holds no classifier ({error})", where=where, fix=fix) from error


def train_from_sources(training: ClassifierTraining) -> tuple[Classifier, Report]:
    """`train_classifier` on documents from files.

    Raises:
        MaxlmError: see `read_documents` and `train_classifier`.
    """
    positive = (document.text for document in read_documents(training.positive))
    negative = (document.text for document in read_documents(training.negative))
    return train_classifier(positive, negative, training.model)


def train_classifier(
    positive: Iterable[bytes], negative: Iterable[bytes], settings: ClassifierConfig
) -> tuple[Classifier, Report]:
    """Train, calibrate and measure a classifier.

    Memory is about 3 bytes for each byte of text. A text that comes several times counts as often,
    all on the same side of the split; one that is among both is left out.

    Args:
        positive, negative: texts in UTF-8.

    Raises:
        MaxlmError: too few documents of one kind in one of the three parts.
    """
    fast = compiled("classifier")

    examples, conflicts = _examples(positive, negative, settings)
    _check_parts(examples, settings)
    parts, labels = examples.parts, examples.labels
    weights = np.zeros(1 << settings.buckets, np.float32)
    squares, bias = np.zeros_like(weights), np.zeros(2)
    train = np.flatnonzero(parts == "train")
    generator = np.random.default_rng(settings.seed)
    # Both kinds weigh the same in training, whatever their numbers; calibration undoes it.
    rarity = 0.5 / np.array([np.mean(~labels[train]), np.mean(labels[train])])
    for _ in range(settings.epochs):
        order = generator.permutation(train)
        fast.train_epoch(
            order, examples.ends, examples.features, labels, rarity, weights, squares, bias,
            settings.learning_rate,
        )  # fmt: skip
    means = fast.mean_of(examples.ends, examples.features, weights)
    middle, last = parts == "calibrate", parts == "measure"
    scale, offset = _platt(means[middle], labels[middle])
    scores = sigmoid(scale * means + offset)
    threshold, reached = suggest_threshold(
        scores[middle], labels[middle], settings.target, settings.target_value
    )
    model = Classifier(settings, weights, scale, offset, threshold)
    trained = int(labels[train].sum()), int((~labels[train]).sum())
    target = f"{settings.target} {settings.target_value:g}"
    return model, Report(trained, conflicts, scores[last], labels[last], threshold, reached, target)


@dataclass(frozen=True)
class _Examples:
    """The features of all documents, document by document."""

    features: np.ndarray
    """Buckets: int32."""
    ends: np.ndarray
    """Where each document's begin in `features`: int64 [documents + 1]."""
    labels: np.ndarray
    """Which documents are positive: bool."""
    parts: np.ndarray
    """What each is for: "train", "calibrate" or "measure"; "" for none."""


def _examples(
    positive: Iterable[bytes], negative: Iterable[bytes], settings: ClassifierConfig
) -> tuple[_Examples, int]:
    """The documents' features; how many are among both kinds and left out."""
    tables = character_classes(), lower_case()
    shape = settings.word_ngrams, settings.char_ngrams, settings.buckets
    features, sizes, labels, parts, digests = [], [], [], [], []
    for label, texts in ((True, positive), (False, negative)):
        texts = iter(texts)
        while batch := list(islice(texts, _BATCH)):
            ends, found = compiled("classifier").features_of(*pack_texts(batch), *tables, *shape)
            features.append(found)
            sizes.append(np.diff(ends))
            labels += [label] * len(batch)
            parts += [_part(text, settings.heldout) for text in batch]
            digests += [hashlib.sha256(text).digest()[:8] for text in batch]
    kinds, ids = np.array(labels, np.bool_), np.array(digests, "S8").view(np.uint64)
    both = np.isin(ids, np.intersect1d(ids[kinds], ids[~kinds]))
    ends = np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)
    parts = np.where(both, "", np.array(parts, dtype=object))
    found = np.concatenate([np.zeros(0, np.int32), *features])
    return _Examples(found, ends, kinds, parts), int(both.sum())


def _part(text: bytes, heldout: float) -> str:
    if is_heldout(text, heldout / 2):
        return "measure"
    return "calibrate" if is_heldout(text, heldout) else "train"


def _check_parts(examples: _Examples, settings: ClassifierConfig) -> None:
    for kind, chosen in (("positive", examples.labels), ("negative", ~examples.labels)):
        for part in ("train", "calibrate", "measure"):
            if not np.any(chosen & (examples.parts == part)):
                what = f"{chosen.sum()} {kind} documents: none of them falls to the part to {part}"
                fix = f"give more documents, or raise heldout (it is {settings.heldout:g})"
                raise MaxlmError(what, fix=fix)


def _platt(means: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Scale and offset of the probability: Platt's fit by Newton's method.

    Targets a little inside of 0 and 1, and the steps halved while the loss does not fall, are after
    Lin, Lin and Weng, "A note on Platt's probabilistic outputs" (2007).
    """
    spread = means.std() or 1.0
    x = np.stack([means / spread, np.ones(len(means))], 1)
    positive = labels.sum()
    negative = len(labels) - positive
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(beta: np.ndarray) -> float:
        z = x @ beta
        return float(np.sum(np.logaddexp(0, z) - target * z))

    beta = np.array([0.0, np.log((positive + 1) / (negative + 1))])
    for _ in range(100):
        p = sigmoid(x @ beta)
        hessian = (x.T * (p * (1 - p))) @ x + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (p - target))
        while loss(beta - step) > loss(beta) and np.abs(step).max() > 1e-9:
            step /= 2
        beta = beta - step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0] / spread), float(beta[1])
