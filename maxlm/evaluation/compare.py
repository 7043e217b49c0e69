"""Compares two evaluations over the same documents, by paired tests."""

import warnings
from collections.abc import Sequence
from math import exp, expm1, log, sqrt
from typing import NamedTuple

import numpy as np
from scipy import stats

from maxlm.config import MaxlmError
from maxlm.evaluation.results import (
    EvalDoc,
    EvaluationResult,
    choose_main_metric,
    is_perplexity,
)


class TaskComparison(NamedTuple):
    """A task's figures of two models over the documents that both have."""

    task: str
    metric: str
    first: float
    second: float
    interval: tuple[
        float, float
    ]  # Of second - first, at 1 - alpha, for this task alone.
    p: float  # Two-sided; compare_evaluations adjusts it for the number of tasks.
    verdict: (
        str  # Whether the second falls or rises (is worse or better); same: p > alpha.
    )
    num_docs: int
    notes: list[str]  # Of documents of one side alone, and of prompts that differ.


def compare_evaluations(
    first: EvaluationResult,
    second: EvaluationResult,
    tasks: Sequence[str],
    alpha: float,
) -> tuple[list[TaskComparison], list[str]]:
    """Compares the main metric of ``tasks``, or of each task and group that both have;
    lists the rest, and why. Raises MaxlmError for missing samples, for tasks of
    ``tasks`` that cannot be compared, and where none can be."""
    found, skipped = [], []
    both = [name for name in first.tasks if name in second.tasks]
    for name in dict.fromkeys(tasks or [*first.units, *second.units]):
        metrics = first.tasks[name].metrics if name in both else {}
        sides = [each.tasks[name].read_samples() for each in (first, second) if metrics]
        scored = [
            m
            for m in metrics
            if all(any(m in s.values for s in side) for side in sides)
        ]
        if metric := choose_main_metric(scored):
            better = metrics[metric].higher_is_better
            found.append(compare_samples(name, metric, sides, better, alpha))
        else:
            skipped.append(
                f"{name} ({'no figure of each document' if metrics else 'not in both'})"
            )
    if not found or (tasks and skipped):
        what, fix = (
            f"cannot compare {', '.join(skipped)}",
            f"tasks of both: {', '.join(both)}",
        )
        raise MaxlmError(what, where=f"{first.path} and {second.path}", fix=fix)
    pairs = zip(found, compute_holm_p_values([each.p for each in found]), strict=True)
    return [
        f._replace(p=p, verdict=f.verdict if p <= alpha else "same") for f, p in pairs
    ], skipped


def compare_samples(
    task: str,
    metric: str,
    sides: Sequence[Sequence[EvalDoc]],
    higher_is_better: bool,
    alpha: float,
) -> TaskComparison:
    """Tests a metric over the documents of both sides, matched by their keys; the
    verdict is the direction.

    Zeros and ones by McNemar's exact test, with Agresti and Min's interval (2005,
    Statistics in Medicine 24). Others by a paired t test of what each document adds to
    the figures, perplexities by their logarithms: unlike Wilcoxon's it tests the mean
    that is shown, and as differences of equal models are symmetric it holds for few
    documents. Raises MaxlmError if no document is in both.
    """
    first, second = ({s.key: s for s in side if metric in s.values} for side in sides)
    keys = [key for key in first if key in second]
    if not keys:
        raise MaxlmError(
            f"no document of {task} is in both evaluations", fix="evaluate one again"
        )
    a = _split_figure(metric, [first[key].values[metric] for key in keys])
    b = _split_figure(metric, [second[key].values[metric] for key in keys])
    n = len(keys)
    lost = int((b < a).sum())
    gained = int((b > a).sum())
    if np.isin([a, b], (0, 1)).all():
        p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        middle = (gained - lost) / (n + 2)
        quantile = float(stats.norm.ppf(1 - alpha / 2))
        error = quantile * sqrt(lost + gained + 1 - (gained - lost) * middle) / (n + 2)
        low, high = middle - error, middle + error
    else:
        with warnings.catch_warnings(
            action="ignore"
        ):  # Of differences that are all alike: nan.
            test = stats.ttest_rel(b, a)
        # No less than a test by flipping signs could give.
        p = max(float(np.nan_to_num(test.pvalue, nan=1.0)), 2.0 ** (1 - n))
        low, high = map(float, test.confidence_interval(1 - alpha))
    alone = [("A", len(first) - n), ("B", len(second) - n)]
    notes = [
        f"{task}: {count:,} documents only in {side}" for side, count in alone if count
    ]
    if changed := sum(
        first[key].prompt_hash != second[key].prompt_hash for key in keys
    ):
        notes.append(f"warning: {task}: {changed:,} prompts differ: other examples?")
    figures = float(a.mean()), float(b.mean())
    if is_perplexity(metric):
        figures = exp(figures[0]), exp(figures[1])
        low, high = figures[0] * expm1(low), figures[0] * expm1(high)
    verdict = "rises" if (figures[1] > figures[0]) == higher_is_better else "falls"
    return TaskComparison(task, metric, *figures, (low, high), p, verdict, n, notes)


def compute_holm_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values so that any of them is at most alpha by chance with probability
    alpha at most (Holm 1979)."""
    order = np.argsort(p_values)
    products = np.arange(len(order), 0, -1) * np.asarray(p_values)[order]
    return np.minimum(1, np.maximum.accumulate(products))[np.argsort(order)].tolist()


def _split_figure(metric: str, values: Sequence[tuple[float, float]]) -> np.ndarray:
    """Splits a metric's figure, a perplexity's logarithm, into what each document adds,
    to first order; their mean is it."""
    sums, weights = np.asarray(values).T
    name = metric.split(" ")[0]
    mean = sums.sum() / weights.sum()
    shares = (sums - mean * weights) / weights.mean()
    if is_perplexity(metric):
        return -(mean + shares)
    return -(mean + shares) / log(2) if name == "bits_per_byte" else sums
