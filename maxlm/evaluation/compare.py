"""Compares two evaluations over the same documents, by paired tests."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import exp, expm1, log, sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from maxlm.config import MaxlmError
from maxlm.evaluation.results import (
    DocKey,
    DocScore,
    EvalDoc,
    EvaluationResult,
    choose_main_metric,
    is_perplexity,
    strip_filter,
)


class TaskComparison(NamedTuple):
    """A task's figures of two models over the documents that both have."""

    task: str
    metric: str
    first: float
    second: float
    interval: tuple[float, float]
    """Of second - first, at 1 - alpha, for this task alone."""
    p: float
    """Two-sided; compare_evaluations adjusts it for the number of tasks."""
    verdict: Literal["rises", "falls", "same"]
    """Whether the second falls or rises (is worse or better); same: p > alpha."""
    num_docs: int
    notes: list[str]
    """Of documents of one side alone, and of prompts that differ."""


class _PairedTest(NamedTuple):
    """A test of a difference second - first, and its interval at 1 - alpha."""

    p: float
    """Two-sided."""
    low: float
    high: float


def compare_evaluations(
    first: EvaluationResult,
    second: EvaluationResult,
    tasks: Sequence[str],
    alpha: float,
) -> tuple[list[TaskComparison], list[str]]:
    """Compares the main metric of ``tasks``, or of each task and group that both have;
    lists the rest, and why. Raises MaxlmError for missing samples, for tasks of
    ``tasks`` that cannot be compared, and where none can be."""
    comparisons: list[TaskComparison] = []
    skipped: list[str] = []
    both = [name for name in first.tasks if name in second.tasks]
    names = tasks or [*first.units, *second.units]
    for name in dict.fromkeys(names):
        metrics = first.tasks[name].metrics if name in both else {}
        if not metrics:
            skipped.append(f"{name} (not in both)")
            continue
        first_samples = first.tasks[name].read_samples()
        second_samples = second.tasks[name].read_samples()
        scored_metrics = [
            metric
            for metric in metrics
            if _has_metric(first_samples, metric)
            and _has_metric(second_samples, metric)
        ]
        metric = choose_main_metric(scored_metrics)
        if not metric:
            skipped.append(f"{name} (no figure of each document)")
            continue
        comparison = compare_samples(
            name,
            metric,
            (first_samples, second_samples),
            higher_is_better=metrics[metric].higher_is_better,
            alpha=alpha,
        )
        comparisons.append(comparison)
    if not comparisons or (tasks and skipped):
        message = f"cannot compare {', '.join(skipped)}"
        fix = f"tasks of both: {', '.join(both)}"
        where = f"{first.path} and {second.path}"
        raise MaxlmError(message, where=where, fix=fix)

    # The more tasks, the more of them differ by chance.
    p_values = compute_holm_p_values([comparison.p for comparison in comparisons])
    adjusted = []
    for comparison, p in zip(comparisons, p_values, strict=True):
        verdict = comparison.verdict if p <= alpha else "same"
        adjusted.append(comparison._replace(p=p, verdict=verdict))
    return adjusted, skipped


def _has_metric(samples: Sequence[EvalDoc], metric: str) -> bool:
    return any(metric in sample.values for sample in samples)


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
    first_samples, second_samples = sides
    first = _index_by_key(first_samples, metric)
    second = _index_by_key(second_samples, metric)
    keys = [key for key in first if key in second]
    if not keys:
        message = f"no document of {task} is in both evaluations"
        raise MaxlmError(message, fix="evaluate one again")

    # What each document adds to the figures, [documents].
    a = _split_figure(metric, [first[key].values[metric] for key in keys])
    b = _split_figure(metric, [second[key].values[metric] for key in keys])
    are_binary = np.isin([a, b], (0, 1)).all()
    if are_binary:
        test = _compare_binary(a, b, alpha)
    else:
        test = _compare_means(a, b, alpha)

    low = test.low
    high = test.high
    first_figure = float(a.mean())
    second_figure = float(b.mean())
    if is_perplexity(metric):
        first_figure = exp(first_figure)
        second_figure = exp(second_figure)
        # The interval is that of a logarithm's difference.
        low = first_figure * expm1(low)
        high = first_figure * expm1(high)
    has_risen = (second_figure > first_figure) == higher_is_better
    return TaskComparison(
        task=task,
        metric=metric,
        first=first_figure,
        second=second_figure,
        interval=(low, high),
        p=test.p,
        verdict="rises" if has_risen else "falls",
        num_docs=len(keys),
        notes=_list_notes(task, first, second, keys),
    )


def _index_by_key(samples: Iterable[EvalDoc], metric: str) -> dict[DocKey, EvalDoc]:
    """Returns the documents that have a metric, by key."""
    return {sample.key: sample for sample in samples if metric in sample.values}


def _list_notes(
    task: str,
    first: Mapping[DocKey, EvalDoc],
    second: Mapping[DocKey, EvalDoc],
    keys: Sequence[DocKey],
) -> list[str]:
    """Says how many documents one side alone has, and how many of those in both
    (``keys``) were asked otherwise."""
    notes = []
    for side, samples in (("A", first), ("B", second)):
        num_alone = len(samples) - len(keys)
        if num_alone:
            notes.append(f"{task}: {num_alone:,} documents only in {side}")
    num_changed = sum(first[key].prompt_hash != second[key].prompt_hash for key in keys)
    if num_changed:
        notes.append(
            f"warning: {task}: {num_changed:,} prompts differ: other examples?"
        )
    return notes


def _compare_binary(a: np.ndarray, b: np.ndarray, alpha: float) -> _PairedTest:
    """Computes McNemar's exact p of zeros and ones, and Agresti and Min's interval of
    the difference: Wald's, with half a document added to each of the four outcomes."""
    num_lost = int((b < a).sum())
    num_gained = int((b > a).sum())
    num_changed = num_lost + num_gained
    p = 1.0
    if num_changed:
        p = float(stats.binomtest(num_lost, num_changed).pvalue)
    difference = num_gained - num_lost
    num_outcomes = len(a) + 4 * 0.5
    middle = difference / num_outcomes
    variance = num_changed + 1 - difference * middle
    quantile = float(stats.norm.ppf(1 - alpha / 2))
    error = quantile * sqrt(variance) / num_outcomes
    return _PairedTest(p, middle - error, middle + error)


def _compare_means(a: np.ndarray, b: np.ndarray, alpha: float) -> _PairedTest:
    """Computes the p of a paired t test, and the interval of the mean difference."""
    # Differences that are all alike have no variance: a warning, and p is NaN.
    with warnings.catch_warnings(action="ignore"):
        test = stats.ttest_rel(b, a)
    p = float(np.nan_to_num(test.pvalue, nan=1.0))
    # No less than a test by flipping signs could give.
    p = max(p, 2.0 ** (1 - len(a)))
    low, high = test.confidence_interval(1 - alpha)
    return _PairedTest(p, float(low), float(high))


def compute_holm_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values so that any of them is at most alpha by chance with probability
    alpha at most (Holm 1979)."""
    order = np.argsort(p_values)
    # The smallest p is multiplied by the number of tasks, the next by one less; none
    # may fall below the one before it.
    num_left = np.arange(len(order), 0, -1)
    products = num_left * np.asarray(p_values)[order]
    adjusted = np.minimum(1, np.maximum.accumulate(products))
    rank = np.argsort(order)  # back to the order of the tasks
    return adjusted[rank].tolist()


def _split_figure(metric: str, scores: Sequence[DocScore]) -> np.ndarray:
    """Splits a metric's figure, a perplexity's logarithm, into what each document adds,
    to first order; returns these [documents], whose mean is the figure."""
    totals, weights = np.asarray(scores).T
    # The ratio Σ total / Σ weight, and what each document moves it by.
    ratio = totals.sum() / weights.sum()
    deviations = (totals - ratio * weights) / weights.mean()
    if is_perplexity(metric):
        return -(ratio + deviations)
    if strip_filter(metric) == "bits_per_byte":  # from nats
        return -(ratio + deviations) / log(2)
    return totals
