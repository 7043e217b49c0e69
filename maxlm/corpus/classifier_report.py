"""How good a classifier of two kinds is: precision, recall, ROC, calibration."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Report:
    """How good a classifier is on documents that neither training nor calibration saw."""

    trained: tuple[int, int]
    """Documents it was trained on: positive, negative."""
    conflicts: int
    """Documents left out as they are among both."""
    scores: np.ndarray
    """The measured documents' probabilities: float64."""
    labels: np.ndarray
    """Which of them are positive: bool."""
    threshold: float
    """The suggested one, found on the calibration documents."""
    reached: bool
    """Whether it reaches its target there."""
    target: str
    """The target, in words."""

    @property
    def precision(self) -> float:
        """Share of the documents above the threshold that are positive."""
        return precision_recall(self.scores, self.labels, self.threshold)[0]

    @property
    def recall(self) -> float:
        """Share of the positive documents that are above the threshold."""
        return precision_recall(self.scores, self.labels, self.threshold)[1]

    @property
    def roc_auc(self) -> float:
        """The chance that a positive document scores above a negative one, ties half."""
        false, true = roc_curve(self.scores, self.labels)
        return float(np.trapezoid(true, false))

    @property
    def brier(self) -> float:
        """Mean squared error of the probabilities."""
        return float(np.mean((self.scores - self.labels) ** 2))

    def calibration(self, bins: int = 10) -> list[tuple[float, float, int]]:
        """For each tenth of the scores with documents: mean score, positive share, documents."""
        places = np.minimum((self.scores * bins).astype(int), bins - 1)
        return [
            (float(self.scores[at].mean()), float(self.labels[at].mean()), int(at.sum()))
            for at in (places == k for k in range(bins))
            if at.any()
        ]

    @property
    def calibration_error(self) -> float:
        """Mean distance between score and positive share over tenths, weighted by documents."""
        parts = [abs(score - share) * number for score, share, number in self.calibration()]
        return sum(parts) / len(self.scores)

    def __str__(self) -> str:
        positive = int(self.labels.sum())
        missed = "" if self.reached else " (NOT reached on the calibration documents)"
        lines = [
            f"trained on   {self.trained[0]} positive, {self.trained[1]} negative documents",
            f"measured on  {positive} positive, {len(self.labels) - positive} negative, held out",
            f"ROC AUC      {self.roc_auc:.4f}",
            f"Brier        {self.brier:.4f}",
            f"calibration  {self.calibration_error:.4f} off on average",
            f"threshold    {self.threshold:.3f}, for {self.target}{missed}",
            f"  precision  {self.precision:.4f}",
            f"  recall     {self.recall:.4f}",
            "score -> share that is positive (documents)",
            *(f"  {s:.2f} -> {share:.2f} ({n})" for s, share, n in self.calibration()),
        ]
        if self.conflicts:
            lines.insert(2, f"left out     {self.conflicts} that are among both")
        return "\n".join(lines)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))


def precision_recall(
    scores: np.ndarray, labels: np.ndarray, threshold: float
) -> tuple[float, float]:
    """Return precision and recall at `threshold`; precision is 1 if nothing scores that much."""
    taken = scores >= threshold
    right = np.sum(taken & labels)
    return float(right / taken.sum()) if taken.any() else 1.0, float(right / labels.sum())


def suggest_threshold(
    scores: np.ndarray, labels: np.ndarray, target: str, value: float
) -> tuple[float, bool]:
    """The threshold that reaches a precision or recall and has most of the other.

    Returns:
        The threshold, one of the scores; whether it reaches `value`, or only comes closest.
    """
    thresholds = np.unique(scores)
    order = np.argsort(-scores, kind="stable")
    taken = np.searchsorted(-scores[order], -thresholds, side="right")
    right = np.cumsum(labels[order])[taken - 1]
    precision, recall = right / taken, right / labels.sum()
    reaches, other = (precision, recall) if target == "precision" else (recall, precision)
    reached = reaches >= value
    if not reached.any():
        return float(thresholds[np.argmax(reaches)]), False
    best = np.lexsort((reaches, np.where(reached, other, -1)))[-1]
    return float(thresholds[best]), True


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates for every threshold, from the highest: float64 [n], [n]."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(labels[order])[last]
    false = last + 1 - true
    return np.append(0, false / (~labels).sum()), np.append(0, true / labels.sum())
