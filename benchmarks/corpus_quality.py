"""The quality classifier: how well it tells two kinds of documents apart, and how fast.

    pip install 'maxlm[corpus]' matplotlib python benchmarks/corpus_quality.py
    --positive GOOD... --negative BAD... [--plot roc.png]

GOOD and BAD are files or folders of documents (text, JSONL with "text", Parquet), such
as extracted manual pages on one side and source code, tables of contents and
configuration files on the other. Times are CPU seconds of one core. Documents that are
pieces of one page may straddle the split; exact copies do not.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from maxlm.corpus.stages.quality import ClassifierConfig, train_classifier
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import is_heldout
from maxlm.data.documents.reader import read_documents

Result = TypeVar("Result")


def measure_seconds(call: Callable[[], Result]) -> tuple[float, Result]:
    """Measures the CPU seconds of a call, and returns them with its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def draw(path: Path, scores: np.ndarray, labels: np.ndarray) -> None:
    """Draws the ROC curve and the calibration, side by side."""
    import matplotlib
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import roc_curve

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    left.plot(*roc_curve(labels, scores)[:2])
    left.set(
        xlabel="false positive rate", ylabel="true positive rate", title="ROC, held-out"
    )
    share, score = calibration_curve(labels, scores, n_bins=10)
    right.plot([0, 1], [0, 1], color="0.8")
    right.plot(score, share, "o-")
    right.set(
        xlabel="score", ylabel="share that is positive", title="calibration, held-out"
    )
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
    good, bad = (
        [
            document.text
            for document in read_documents(SourceConfig(documents=tuple(paths)))
        ]
        for paths in (arguments.positive, arguments.negative)
    )
    raw = good + bad
    labels = np.arange(len(good) + len(bad)) < len(good)
    texts = [text.decode() for text in raw]
    training, (model, report) = measure_seconds(
        lambda: train_classifier(good, bad, settings)
    )
    predicting, scores = measure_seconds(lambda: model.predict_proba(texts))
    print(report)
    size = sum(map(len, raw)) / 1e6
    print(
        f"\n{len(raw)} documents, {size:.1f} MB; CPU seconds: training {training:.2f}"
    )
    print(
        f"prediction: {len(raw) / predicting:.0f} documents/s, {size / predicting:.1f} "
        f"MB/s"
    )
    if arguments.plot:
        measured = np.array([is_heldout(text, settings.heldout / 2) for text in raw])
        draw(arguments.plot, scores[measured], labels[measured])


if __name__ == "__main__":
    main()
