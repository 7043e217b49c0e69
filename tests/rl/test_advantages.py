"""Advantages of groups are those of one group after the other; the generalised estimate
is that of its definition, a double loop in float64."""

import numpy as np
import pytest

from maxlm.rl.advantages import (
    compute_group_advantages,
    compute_leave_one_out_advantages,
    estimate_advantages,
    find_groups_without_variance,
    whiten,
)

SCORES = np.array(
    [[1.0, 0.0, 0.25, 0.0, 0.5], [0.3] * 5, [0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5]
)


def test_groups_one_by_one():
    for ddof in (0, 1):
        ours = compute_group_advantages(SCORES, ddof=ddof, epsilon=1e-6)
        for group, advantages in zip(SCORES, ours, strict=True):
            want = (group - group.mean()) / (group.std(ddof=ddof) + 1e-6)
            np.testing.assert_allclose(advantages, want, atol=1e-9)
    ours = compute_group_advantages(SCORES, scale="none")
    np.testing.assert_allclose(ours, SCORES - SCORES.mean(1, keepdims=True), atol=1e-12)
    ours = compute_group_advantages(SCORES, scale="batch", epsilon=1e-4)
    want = (SCORES - SCORES.mean(1, keepdims=True)) / (SCORES.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(ours, want, atol=1e-12)
    ours = compute_group_advantages(SCORES, scale="mean", epsilon=0.0)
    want = SCORES[2] / SCORES[2].mean() - 1
    np.testing.assert_allclose(ours[2], want)
    np.testing.assert_array_equal(ours[3], np.zeros(5))


def test_equal_scores_teach_nothing():
    """Also where their mean is not exactly what they are, and epsilon is small."""
    scores = np.array([[0.1] * 3, [0.1, 0.1, 0.2]])
    ours = compute_group_advantages(scores, epsilon=1e-30)
    np.testing.assert_array_equal(ours[0], np.zeros(3))
    several = np.stack([scores, np.ones_like(scores)], -1)
    penalties = np.zeros(scores.shape)
    is_constant = find_groups_without_variance(several, [1, -0.5], penalties)
    np.testing.assert_array_equal(is_constant, [True, False])
    # A reward that is only watched tells no samples apart; a penalty does.
    is_constant = find_groups_without_variance(several, [0, 1], penalties)
    np.testing.assert_array_equal(is_constant, [True, True])
    penalties[0, 1] = 0.5
    is_constant = find_groups_without_variance(several, [0, 1], penalties)
    np.testing.assert_array_equal(is_constant, [False, True])


def test_samples_without_a_score():
    scores = np.array([[1.0, np.nan, 0.0, 0.5], [np.nan] * 4, [np.nan, 1.0, 1.0, 1.0]])
    ours = compute_group_advantages(scores)
    scored = np.array([1.0, 0.0, 0.5])
    want = (scored - 0.5) / (scored.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(ours[0], [want[0], 0, want[1], want[2]])
    np.testing.assert_array_equal(ours[1:], np.zeros((2, 4)))
    is_constant = find_groups_without_variance(
        scores[..., None], [1.0], np.zeros(scores.shape)
    )
    np.testing.assert_array_equal(is_constant, [False, True, True])
    ours = compute_leave_one_out_advantages(scores)
    np.testing.assert_allclose(ours[0], [0.75, 0, -0.75, 0])
    np.testing.assert_array_equal(ours[1:], np.zeros((2, 4)))


def test_several_rewards():
    random = np.random.default_rng(1)
    scores = random.normal(size=(3, 4, 2)) * [1.0, 50.0]
    weights = (1.0, 0.5)
    ours = compute_group_advantages(scores, weights=weights)
    total = scores @ weights
    np.testing.assert_allclose(ours, compute_group_advantages(total))
    ours = compute_group_advantages(scores, weights=weights, merge="normalize_then_sum")
    total = np.zeros((3, 4))
    for reward, weight in enumerate(weights):
        for group in range(3):
            values = scores[group, :, reward]
            scaled = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
            total[group] += weight * scaled
    want = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(ours, want, rtol=1e-12)


def test_leave_one_out():
    ours = compute_leave_one_out_advantages(SCORES)
    for group in range(len(SCORES)):
        for sample in range(SCORES.shape[1]):
            others = np.delete(SCORES[group], sample)
            want = SCORES[group, sample] - others.mean()
            np.testing.assert_allclose(ours[group, sample], want, atol=1e-12)


def draw_steps(seed: int, rows: int, length: int):
    """Ragged segments with entries between their steps that are none, and padding."""
    random = np.random.default_rng(seed)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < length:
            size = int(random.integers(1, 12))
            if row % 2 and start + size > length - 5:
                break
            segment_ids[row, start : start + size] = segment
            start += size
            segment += 1
    is_step = random.random((rows, length)) < 0.7
    rewards, values = random.normal(size=(2, rows, length))
    return rewards, values, is_step, segment_ids


def estimate_by_definition(rewards, values, is_step, segment_ids, discount, decay):
    """A_t = Σ_l (γλ)^l·δ_{t+l}, each from the start."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        for segment in range(1, segment_ids[row].max() + 1):
            steps = np.flatnonzero((segment_ids[row] == segment) & is_step[row])
            for t in range(len(steps)):
                for later in range(t, len(steps)):
                    place = steps[later]
                    delta = rewards[row, place] - values[row, place]
                    if later + 1 < len(steps):
                        delta += discount * values[row, steps[later + 1]]
                    advantages[row, steps[t]] += (discount * decay) ** (
                        later - t
                    ) * delta
    return advantages


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.97, 1.0), (0.9, 0.0)])
def test_generalised_advantages(discount, decay):
    steps = draw_steps(5, 6, 41)
    want = estimate_by_definition(*steps, discount, decay)
    ours = estimate_advantages(*steps, discount=discount, decay=decay)
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-9)
    assert np.abs(want).max() > 1


def test_whitening():
    random = np.random.default_rng(2)
    values = random.normal(3.0, 5.0, (4, 9))
    is_counted = random.random((4, 9)) < 0.6
    values[~is_counted] = 1e9
    chosen = values[is_counted]
    want = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    ours = whiten(values, is_counted)
    np.testing.assert_allclose(ours[is_counted], want)
    assert not ours[~is_counted].any()
    ours = whiten(values, is_counted, keep_mean=True)
    np.testing.assert_allclose(ours[is_counted], want + chosen.mean())
    assert not whiten(values, np.zeros_like(is_counted)).any()
