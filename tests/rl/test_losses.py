"""Losses of policies, corrections and estimates of a divergence on packed rows are
those of the papers' formulas, one sequence after the other in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.rl import losses
from maxlm.rl.corrections import compute_correction, mask_off_policy_sequences
from maxlm.rl.losses import ClipLimits, SapoTemperatures, VespoShape
from maxlm.rl.sequences import PackedSequences
from tests.rl.policy_rows import SEGMENTS, draw_policy_rows, split_sequences

ROWS = draw_policy_rows()
LIMITS = ClipLimits(0.2, 0.28)
BOUNDED = ClipLimits(0.2, 0.28, delta=1.5)
TEMPERATURES = SapoTemperatures(1.0, 1.05)
NEAR = {"rtol": 2e-5, "atol": 1e-6}


def pack(rows: dict[str, np.ndarray]) -> PackedSequences:
    return PackedSequences.of_rows(
        jnp.asarray(rows["segment_ids"]), jnp.asarray(rows["weights"]), SEGMENTS
    )


SEQUENCES = pack(ROWS)


def spread_reference(function: Any) -> np.ndarray:
    """What ``function`` makes of each sequence's entries, in rows; 0 elsewhere."""
    result = np.zeros(ROWS["weights"].shape)
    for sequence in split_sequences(ROWS):
        row, _ = sequence.place
        result[row, sequence.entries] = function(sequence.arrays)
    return result


def clip_reference(ratio: np.ndarray, advantage: np.ndarray, limits: ClipLimits):
    total = []
    for r, a in zip(ratio, advantage, strict=True):
        bounded = r if limits.delta is None else min(r, limits.delta)
        clipped = min(max(r, 1 - limits.low), 1 + limits.high)
        total.append(-min(bounded * a, clipped * a))
    return np.array(total)


def counted(values: jax.Array) -> np.ndarray:
    return np.where(ROWS["weights"] > 0, values, 0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("limits", [LIMITS, BOUNDED], ids=["one side", "two sides"])
def test_clipped_losses(level, limits):
    def want(x):
        log_ratio = x["log_probs"] - x["old_log_probs"]
        if level == "sequence":
            log_ratio = np.full_like(log_ratio, log_ratio.mean())
        return clip_reference(np.exp(log_ratio), x["advantages"], limits)

    ratios = losses.compute_log_ratios(
        ROWS["log_probs"], ROWS["old_log_probs"], SEQUENCES, level
    )
    ours = losses.compute_clipped_losses(ratios, ROWS["advantages"], limits)
    np.testing.assert_allclose(counted(ours.per_token), spread_reference(want), **NEAR)


def test_clipped_tokens_have_no_gradient():
    """And only these: a token is said to be clipped where its gradient is gone."""

    def total(log_probs):
        ratios = log_probs - ROWS["old_log_probs"]
        return losses.compute_clipped_losses(ratios, ROWS["advantages"], LIMITS)

    gradient = jax.grad(lambda x: SEQUENCES.total(total(x).per_token))(
        jnp.asarray(ROWS["log_probs"])
    )
    is_clipped = np.asarray(total(ROWS["log_probs"]).is_clipped)
    is_counted = ROWS["weights"] > 0
    assert 0 < is_clipped[is_counted].mean() < 1
    np.testing.assert_array_equal(
        is_clipped[is_counted], np.asarray(gradient)[is_counted] == 0
    )


def test_cispo_and_sapo_losses():
    ratios = ROWS["log_probs"] - ROWS["old_log_probs"]

    def want_cispo(x):
        ratio = np.exp(x["log_probs"] - x["old_log_probs"])
        return -np.minimum(ratio, 1.3) * x["advantages"] * x["log_probs"]

    cispo = losses.compute_cispo_losses(
        ratios, ROWS["log_probs"], ROWS["advantages"], 1.3
    )
    np.testing.assert_allclose(
        counted(cispo.per_token), spread_reference(want_cispo), **NEAR
    )

    def want_sapo(x):
        ratio = np.exp(x["log_probs"] - x["old_log_probs"])
        t = np.where(x["advantages"] > 0, 1.0, 1.05)
        return -4 / t / (1 + np.exp(-t * (ratio - 1))) * x["advantages"]

    sapo = losses.compute_sapo_losses(ratios, ROWS["advantages"], TEMPERATURES)
    np.testing.assert_allclose(
        counted(sapo.per_token), spread_reference(want_sapo), **NEAR
    )


def test_vespo_losses_with_a_correction():
    shape = VespoShape()
    correction = compute_correction(
        jnp.asarray(ROWS["old_log_probs"]),
        jnp.asarray(ROWS["sampled_log_probs"]),
        SEQUENCES,
        "token_truncate",
        cap=1.5,
    )

    def want(x):
        drift = (x["log_probs"] - x["old_log_probs"]).sum()
        ratio = np.exp(x["old_log_probs"] - x["sampled_log_probs"])
        w = math.exp(drift + np.log(np.minimum(ratio, 1.5)).sum())
        is_positive = x["advantages"][0] >= 0
        k = shape.k_positive if is_positive else shape.k_negative
        scale = shape.lambda_positive if is_positive else shape.lambda_negative
        gate = w**k * math.exp(scale * (1 - w))
        return -gate * x["advantages"] * x["log_probs"]

    ours = losses.compute_vespo_losses(
        ROWS["log_probs"],
        ROWS["old_log_probs"],
        ROWS["advantages"],
        SEQUENCES,
        shape,
        correction.log_sums,
    )
    np.testing.assert_allclose(
        counted(ours.per_token), spread_reference(want), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_corrections(level, mode):
    def want(x):
        difference = x["old_log_probs"] - x["sampled_log_probs"]
        if level == "sequence":
            difference = np.full_like(difference, difference.sum())
        ratio = np.exp(difference)
        if mode == "truncate":
            return np.clip(ratio, 0.7, 1.4)
        return np.where((ratio < 0.7) | (ratio > 1.4), 0, ratio)

    ours = compute_correction(
        ROWS["old_log_probs"],
        ROWS["sampled_log_probs"],
        SEQUENCES,
        f"{level}_{mode}",
        cap=1.4,
        floor=0.7,
    )
    reference = spread_reference(want)
    np.testing.assert_allclose(counted(ours.per_token), reference, **NEAR)
    assert 0 < counted(ours.masked).sum() < ROWS["weights"].sum()


def test_a_sample_of_unknown_probability_is_not_corrected():
    sampled = np.full_like(ROWS["sampled_log_probs"], np.nan)
    ours = compute_correction(
        ROWS["old_log_probs"], sampled, SEQUENCES, "token_mask", cap=1.4
    )
    np.testing.assert_array_equal(ours.per_token, np.ones_like(sampled))


def test_sequences_that_the_policy_left_are_masked_where_the_advantage_is_negative():
    rows = ROWS | {"sampled_log_probs": ROWS["log_probs"] + 0.5}
    rows["sampled_log_probs"][0, :9] -= 0.45  # the first sequence stays near
    ours = mask_off_policy_sequences(
        rows["log_probs"], rows["sampled_log_probs"], rows["advantages"], SEQUENCES, 0.2
    )
    want = np.ones_like(rows["weights"])
    for row in range(len(want)):
        for segment in range(1, SEGMENTS + 1):
            is_member = rows["segment_ids"][row] == segment
            is_far = (row, segment) != (0, 1)
            if is_far and (rows["advantages"][row][is_member] < 0).any():
                want[row][is_member] = 0
    assert 0 < (want == 0).sum() < rows["weights"].sum()
    is_present = rows["segment_ids"] > 0
    np.testing.assert_array_equal(np.asarray(ours)[is_present], want[is_present])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_gradient_of_a_divergence(estimator):
    """In the mean over tokens that the policy draws, from every token of a small
    vocabulary: k2's, and those that are weighted by the ratio, are the divergence's
    own; k1's is 0 without the weight, k3's that of the reversed divergence. All but
    k2's are the divergence's size."""
    random = np.random.default_rng(3)
    logits, other = random.normal(size=(2, 7))
    q = jax.nn.log_softmax(jnp.asarray(other))

    def divergence(z):
        p = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(p) * (p - q))

    def reversed_divergence(z):
        return jnp.sum(jnp.exp(q) * (q - jax.nn.log_softmax(z)))

    def mean(z, is_weighted):
        p = jax.nn.log_softmax(z)
        old = jax.lax.stop_gradient(p)
        kl = losses.estimate_kl(p, q, estimator)
        if is_weighted:
            kl = losses.correct_kl_bias(kl, p - old)
        return jnp.sum(jnp.exp(old) * kl)

    z = jnp.asarray(logits)
    plain = jax.grad(mean)(z, False)
    exact = jax.grad(divergence)(z)
    near = {"rtol": 1e-4, "atol": 1e-6}
    match estimator:
        case "k1":
            np.testing.assert_allclose(plain, np.zeros(7), atol=1e-6)
        case "k2":
            np.testing.assert_allclose(plain, exact, **near)
        case "k3":
            np.testing.assert_allclose(plain, jax.grad(reversed_divergence)(z), **near)
    if estimator != "k2":
        np.testing.assert_allclose(jax.grad(mean)(z, True), exact, **near)
        np.testing.assert_allclose(mean(z, False), divergence(z), rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "luspo", "dr_grpo", "dapo"])
def test_averages(loss_type):
    means, total, tokens, count = 0.0, 0.0, 0, 0
    for sequence in split_sequences(ROWS):
        values = sequence.arrays["entropies"]
        means += values.mean()
        total += values.sum()
        tokens += len(values)
        count += 1
    want = {
        "grpo": means / count,
        "luspo": total / count,
        "dr_grpo": total / (count * 40),
        "dapo": total / tokens,
    }
    ours, divisor = losses.sum_token_losses(
        jnp.asarray(ROWS["entropies"]), SEQUENCES, loss_type, 40
    )
    np.testing.assert_allclose(ours / divisor, want[loss_type], rtol=1e-5)


def test_losses_of_whole_sequences():
    advantages = np.zeros((3, SEGMENTS), np.float32)
    want = np.zeros((3, SEGMENTS))
    for sequence in split_sequences(ROWS):
        x = sequence.arrays
        advantages[sequence.place] = x["advantages"][0]
        ratio = np.exp((x["log_probs"] - x["old_log_probs"]).sum(keepdims=True))
        want[sequence.place] = clip_reference(ratio, x["advantages"][:1], LIMITS)[0]
    ours, is_clipped = losses.compute_sequence_clipped_losses(
        ROWS["log_probs"], ROWS["old_log_probs"], advantages, SEQUENCES, LIMITS
    )
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-6)
    assert not is_clipped[2].any()  # a row without sequences


def test_value_losses_take_the_worse_of_both():
    values, old, returns = np.array([[0.0, 0.5, 3.0], [0.1, 0.2, 2.0], [1.0, 0.5, 0.0]])
    ours = losses.compute_value_losses(values, old, returns, 0.2)
    clipped = np.clip(values, old - 0.2, old + 0.2)
    want = np.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2
    np.testing.assert_allclose(ours.per_token, want, rtol=1e-6)
    np.testing.assert_array_equal(ours.is_clipped, [False, True, False])
    plain = losses.compute_value_losses(values, old, returns, None)
    np.testing.assert_allclose(plain.per_token, (values - returns) ** 2 / 2, rtol=1e-6)


def test_long_answers_lose_more_and_more():
    lengths = [10, 60, 61, 75, 80, 81]
    penalties = [losses.compute_overlong_penalty(n, 80, 20) for n in lengths]
    np.testing.assert_allclose(penalties, [0, 0, -0.05, -0.75, -1, -1])


def test_the_weight_of_a_divergence_moves_to_its_target():
    coef = jnp.float32(0.2)

    def adapt(kl: float) -> float:
        moved = losses.adapt_kl_coef(
            coef, jnp.float32(kl), target=6.0, horizon=10_000, num_samples=256
        )
        return float(moved)

    assert adapt(6.0) == pytest.approx(0.2)
    assert adapt(6.6) == pytest.approx(0.2 * (1 + 0.1 * 256 / 10_000))
    assert adapt(60.0) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    assert adapt(0.0) == pytest.approx(0.2 * (1 - 0.2 * 256 / 10_000))
