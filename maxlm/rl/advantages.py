"""Advantages: how much better a sample, or a token, is than expected.

Computed on the host in float64: those of groups from scores alone, a generalised
advantage estimate from a model's values.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ScoreScale = Literal["group", "batch", "mean", "none"]
ScoreMerge = Literal["sum_then_normalize", "normalize_then_sum"]
ZERO_VARIANCE = 1e-12
"""Scores whose standard deviation is no more than this share of the largest are
equal."""
WHITEN_EPSILON = 1e-8
"""Added to a variance, as TRL 1.12 does."""


def compute_group_advantages(
    scores: NDArray[np.float64],
    *,
    scale: ScoreScale = "group",
    merge: ScoreMerge = "sum_then_normalize",
    weights: Sequence[float] | None = None,
    ddof: int = 1,
    epsilon: float = 1e-4,
) -> NDArray[np.float64]:
    """Computes advantages [prompts, k] of the k samples of each prompt.

    Scores that are NaN count for nothing: a sample without any has the advantage 0, and
    no part in its group's mean. A group of equal scores has the advantage 0.

    Args:
        scores: [prompts, k], or of several rewards [prompts, k, rewards].
        scale: a score less its group's mean is divided by the standard deviation of
            the group (GRPO, Shao et al. 2024, arXiv 2402.03300, §4.1.2) or of the whole
            batch (Liu et al. 2025, arXiv 2508.08221); by the group's mean (MaxRL,
            arXiv 2602.02710); or by nothing (Dr. GRPO, arXiv 2503.20783).
        merge: several rewards are added up by weight, and then normalised; or each is
            normalised within its group, they are added up, and the sum is normalised
            over the batch (GDPO, arXiv 2601.05242).
        weights: of the rewards; None: 1 each.
        ddof: the standard deviation divides by k − ddof: 1 (TRL, verl), or 0.
        epsilon: added to what is divided by: 1e-4 (TRL), 1e-6 (verl, tunix), 1e-9
            (OpenRLHF).
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim == 2:
        scores = scores[..., None]
    if weights is None:
        weights = (1.0,) * scores.shape[-1]
    reward_weights = np.asarray(weights, np.float64)
    if reward_weights.shape != scores.shape[-1:]:
        raise ValueError(
            f"{scores.shape[-1]} rewards have {len(reward_weights)} weights"
        )
    is_scored = ~np.isnan(scores)
    has_score = np.asarray(is_scored.any(-1))
    if merge == "normalize_then_sum":
        centred = scores - _average(scores, is_scored, 1)
        deviation = _deviate(scores, is_scored, 1, ddof)
        normalized = _divide(centred, deviation, epsilon)
        total = np.where(is_scored, normalized * reward_weights, 0.0).sum(-1)
        total = np.where(has_score, total, np.nan)
        centred = total - _average(total, has_score, None)
        deviation = _deviate(total, has_score, None, ddof)
        advantages = _divide(centred, deviation, epsilon)
        return np.where(has_score, advantages, 0.0)
    total = np.where(is_scored, scores * reward_weights, 0.0).sum(-1)
    mean = _average(total, has_score, 1)
    group_deviation = _deviate(total, has_score, 1, ddof)
    centred = total - mean
    # Equal scores less their mean are rounding, which a small epsilon would enlarge.
    is_equal = _is_constant(group_deviation, total, has_score)
    match scale:
        case "none":
            advantages = centred
        case "group":
            advantages = _divide(centred, group_deviation, epsilon)
        case "batch":
            deviation = _deviate(total, has_score, None, ddof)
            advantages = _divide(centred, deviation, epsilon)
        case "mean":
            advantages = _divide(centred, mean, epsilon)
    return np.where(has_score & ~is_equal, advantages, 0.0)


def sum_scores(
    scores: NDArray[np.float64], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Adds up rewards [prompts, k, rewards] by weight: [prompts, k]. One that is NaN
    counts for nothing; without any, the sum is NaN."""
    is_scored = ~np.isnan(scores)
    totals = np.where(is_scored, scores * np.asarray(weights), 0.0).sum(-1)
    return np.where(is_scored.any(-1), totals, np.nan)


def compute_leave_one_out_advantages(
    scores: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns scores [prompts, k] less the mean of the prompt's other samples (RLOO,
    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 7). A sample
    whose score is NaN, or that has no scored sibling, has the advantage 0."""
    scores = np.asarray(scores, np.float64)
    is_scored = ~np.isnan(scores)
    values = np.where(is_scored, scores, 0.0)
    num_siblings = is_scored.sum(1, keepdims=True) - 1
    siblings_sum = values.sum(1, keepdims=True) - values
    baseline = siblings_sum / np.maximum(num_siblings, 1)
    return np.where(is_scored & (num_siblings > 0), values - baseline, 0.0)


def find_groups_without_variance(
    scores: NDArray[np.float64],
    weights: Sequence[float],
    penalties: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Says of each prompt whether its samples all have the same of every reward that
    counts, and the same penalty: nothing is to be learnt from them.

    Args:
        scores: [prompts, k, rewards]; those that are NaN are passed over.
        weights: of the rewards; one of weight 0 does not count.
        penalties: taken from the samples' sums, [prompts, k].
    """
    counted = scores[..., np.asarray(weights, np.float64) != 0]
    parts = np.concatenate([counted, penalties[..., None]], axis=-1)
    is_scored = ~np.isnan(parts)
    deviation = _deviate(parts, is_scored, 1, 0)
    is_constant = _is_constant(deviation, parts, is_scored)
    return np.asarray(is_constant[:, 0].all(-1))


def _average(
    values: NDArray[np.float64], chosen: NDArray[np.bool_], axis: int | None
) -> NDArray[np.float64]:
    """Averages chosen values, with the axis kept; 0 where there is none."""
    count = chosen.sum(axis, keepdims=True)
    total = np.where(chosen, values, 0.0).sum(axis, keepdims=True)
    return total / np.maximum(count, 1)


def _deviate(
    values: NDArray[np.float64],
    chosen: NDArray[np.bool_],
    axis: int | None,
    ddof: int,
) -> NDArray[np.float64]:
    """Returns the standard deviation of chosen values, with the axis kept; 0 where
    there are too few."""
    count = chosen.sum(axis, keepdims=True)
    differences = np.where(chosen, values - _average(values, chosen, axis), 0.0)
    squares = np.square(differences).sum(axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - ddof, 1))


def _is_constant(
    deviation: NDArray[np.float64],
    values: NDArray[np.float64],
    chosen: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Says of each group, axis 1, whether its values differ by rounding alone."""
    largest = np.abs(np.where(chosen, values, 0.0)).max(1, keepdims=True)
    return deviation <= ZERO_VARIANCE * largest


def _divide(
    values: NDArray[np.float64], divisor: NDArray[np.float64], epsilon: float
) -> NDArray[np.float64]:
    """Divides by divisor + epsilon; 0 where both are 0."""
    divisor = divisor + epsilon
    return np.where(divisor == 0, 0.0, values / np.where(divisor == 0, 1.0, divisor))


def estimate_advantages(
    rewards: NDArray[np.float64],
    values: NDArray[np.float64],
    is_step: NDArray[np.bool_],
    segment_ids: NDArray[np.int32],
    *,
    discount: float,
    decay: float,
) -> NDArray[np.float64]:
    """Computes generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438,
    equation 16) of packed rows [rows, S]: A_t = δ_t + γλ·A_{t+1} with δ_t = r_t +
    γ·V_{t+1} − V_t, where t + 1 is the next step of the same segment, and no step is
    worth 0; 0 where no step is.

    Args:
        rewards, values: of each step; what else stands there is not read.
        is_step: entries that are steps; others, such as an environment's tokens, are
            passed over.
        segment_ids: 1, 2, ... of sequences; 0 of padding.
        discount: γ.
        decay: λ.
    """
    is_step = is_step & (segment_ids != 0)
    advantages = np.zeros(rewards.shape, np.float64)
    # Of each row, the step behind the entry at hand.
    next_value = np.zeros(len(rewards), np.float64)
    next_advantage = np.zeros(len(rewards), np.float64)
    next_segment = np.zeros(len(rewards), segment_ids.dtype)
    for entry in reversed(range(rewards.shape[1])):
        segment = segment_ids[:, entry]
        is_same = segment == next_segment
        next_value = np.where(is_same, next_value, 0.0)
        next_advantage = np.where(is_same, next_advantage, 0.0)
        delta = rewards[:, entry] + discount * next_value - values[:, entry]
        advantage = delta + discount * decay * next_advantage
        is_here = is_step[:, entry]
        advantages[:, entry] = np.where(is_here, advantage, 0.0)
        next_value = np.where(is_here, values[:, entry], next_value)
        next_advantage = np.where(is_here, advantage, next_advantage)
        next_segment = segment
    return advantages


def whiten(
    values: NDArray[np.float64],
    is_counted: NDArray[np.bool_],
    *,
    keep_mean: bool = False,
) -> NDArray[np.float64]:
    """Scales the values that count to a variance of 1, and shifts them to a mean of 0
    unless ``keep_mean``; others become 0. The variance divides by their number less
    1."""
    counted = values[is_counted]
    whitened = np.zeros(values.shape, np.float64)
    if not counted.size:
        return whitened
    mean = counted.mean()
    variance = np.square(counted - mean).sum() / max(counted.size - 1, 1)
    scaled = (counted - mean) / np.sqrt(variance + WHITEN_EPSILON)
    whitened[is_counted] = scaled + mean if keep_mean else scaled
    return whitened
