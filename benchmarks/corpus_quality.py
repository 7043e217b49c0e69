"""The quality classifier beside scikit-learn's hashed words and logistic regression.

    pip install 'maxlm[corpus]' matplotlib
    python benchmarks/corpus_quality.py --positive GOOD... --negative BAD... [--plot roc.png]

GOOD and BAD are files or folders of documents (text, JSONL with "text", Parquet), such as extracted
manual pages on one side and source code, tables of contents and configuration files on the other.
Both sides train on the same documents and are measured on the same held-out ones, in CPU seconds of
one core. The peer sees the same n-grams of words, TF-IDF left out, so the figures compare like with
like. Documents that are pieces of one page may straddle the split; exact copies do not.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from maxlm.corpus.classifier import (
    ClassifierConfig,
    ClassifierTraining,
    train_classifier,
    train_from_sources,
)
from maxlm.corpus.classifier_report import Report, roc_curve
from maxlm.corpus.textbuffers import pack_texts
from maxlm.data.documents import SourceConfig, read_documents
from maxlm.data.documents.heldout import is_heldout

Result = TypeVar("Result")


def seconds(call: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds of a call, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def peer_report(texts: list[str], labels: np.ndarray, settings: ClassifierConfig):
    """scikit-learn on the same split: training and prediction seconds, test scores and labels."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    half = settings.heldout / 2
    test = np.array([is_heldout(text, half) for text in texts])
    train = ~np.array([is_heldout(text, settings.heldout) for text in texts])
    vectorizer = HashingVectorizer(
        n_features=1 << settings.buckets, ngram_range=(1, settings.word_ngrams)
    )
    model = LogisticRegression(max_iter=200)

    def fit():
        chosen = [text for text, taken in zip(texts, train, strict=True) if taken]
        model.fit(vectorizer.transform(chosen), labels[train])

    training, _ = seconds(fit)
    predicting, scores = seconds(lambda: model.predict_proba(vectorizer.transform(texts))[:, 1])
    return training, predicting, np.asarray(scores)[test], labels[test]


def draw(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], report: Report) -> None:
    """ROC curves and the calibration of ours, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    for name, (scores, labels) in curves.items():
        left.plot(*roc_curve(scores, labels), label=name)
    left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, held-out")
    left.legend(loc="lower right")
    score, share, _ = zip(*report.calibration(), strict=True)
    right.plot([0, 1], [0, 1], color="0.8")
    right.plot(score, share, "o-")
    right.set(xlabel="score", ylabel="share that is positive", title="calibration, held-out")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--positive", nargs="+", required=True)
    parser.add_argument("--negative", nargs="+", required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--word-ngrams", type=int, default=2)
    parser.add_argument("--char-ngrams", type=int, default=0)
    arguments = parser.parse_args()
    settings = ClassifierConfig(
        word_ngrams=arguments.word_ngrams, char_ngrams=arguments.char_ngrams
    )
    training = ClassifierTraining(
        positive=SourceConfig(documents=tuple(arguments.positive)),
        negative=SourceConfig(documents=tuple(arguments.negative)),
        model=settings,
    )
    good = [document.text for document in read_documents(training.positive)]
    bad = [document.text for document in read_documents(training.negative)]
    raw, labels = good + bad, np.arange(len(good) + len(bad)) < len(good)
    few = ClassifierConfig(epochs=1, buckets=8, heldout=0.5, char_ngrams=settings.char_ngrams)
    train_classifier(good[:200], bad[:200], few)[0].predict(*pack_texts(raw[:2]))  # Compiles.

    spent, (model, report) = seconds(lambda: train_from_sources(training))
    predict, _ = seconds(lambda: model.predict(*pack_texts(raw)))
    print(report)
    texts = [text.decode() for text in raw]
    their_training, their_predict, scores, their_labels = peer_report(texts, labels, settings)
    theirs = Report((0, 0), 0, scores, their_labels, 0.5, True, "")
    size = sum(map(len, raw)) / 1e6
    print(f"\n{len(raw)} documents, {size:.1f} MB; CPU seconds")
    print(f"{'':14}{'train s':>9}{'docs/s':>9}{'MB/s':>8}{'ROC AUC':>9}{'Brier':>8}")
    for name, train_s, predict_s, each in (
        ("maxlm", spent, predict, report),
        ("scikit-learn", their_training, their_predict, theirs),
    ):
        speed = f"{len(raw) / predict_s:9.0f}{size / predict_s:8.1f}"
        print(f"{name:14}{train_s:9.2f}{speed}{each.roc_auc:9.4f}{each.brier:8.4f}")
    if arguments.plot:
        curves = {"maxlm": (report.scores, report.labels), "scikit-learn": (scores, their_labels)}
        draw(arguments.plot, curves, report)


if __name__ == "__main__":
    main()
