"""Losses of policies on packed rows: pure functions of log-probabilities and advantages
[..., S].

An entry of a row is about its target token. All log-probabilities are in nats.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.rl.corrections import MAX_LOG_RATIO, MIN_LOG_RATIO
from maxlm.rl.sequences import PackedSequences

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
RatioLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]


class ClipLimits(NamedTuple):
    """Limits of the ratio of the current policy to the old one."""

    low: float
    """The ratio counts as no less than 1 − low where the advantage is negative."""
    high: float
    """It counts as no more than 1 + high where the advantage is positive."""
    delta: float | None = None
    """It counts as no more than this where the advantage is negative (two-sided
    clipping, INTELLECT-2, arXiv 2505.07291, §3.4); None: as much as it is."""


class SapoTemperatures(NamedTuple):
    """Temperatures of the soft gate of SAPO."""

    positive: float
    """Where the advantage is positive."""
    negative: float
    """Elsewhere."""


class VespoShape(NamedTuple):
    """The gamma weighting w^k·exp(λ·(1 − w)) of VESPO, by the advantage's sign."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0


class PolicyLosses(NamedTuple):
    """Losses of tokens."""

    per_token: jax.Array
    """fp32 [..., S]; what stands where nothing counts is to be left out."""
    is_clipped: jax.Array
    """Whether a limit takes away the token's gradient, bool [..., S]."""


def compute_log_ratios(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    sequences: PackedSequences,
    level: RatioLevel,
) -> jax.Array:
    """Returns logarithms of the ratio of the current policy to the old one, [..., S]:
    of each token, or for all tokens of a sequence their mean (GSPO, Zheng et al. 2025,
    arXiv 2507.18071, equation 7)."""
    log_ratios = log_probs - old_log_probs
    if level == "token":
        return log_ratios
    return sequences.spread(sequences.mean(log_ratios))


def compute_clipped_losses(
    log_ratios: jax.Array, advantages: jax.Array, limits: ClipLimits
) -> PolicyLosses:
    """Computes −min(r·A, clip(r, 1 − low, 1 + high)·A) of the ratio r (PPO, Schulman et
    al. 2017, arXiv 1707.06347, equation 7; the two limits apart: DAPO, Yu et al. 2025,
    arXiv 2503.14476, §3.1)."""
    ratios = jnp.exp(log_ratios)
    clipped = jnp.clip(ratios, 1 - limits.low, 1 + limits.high)
    bounded = ratios
    if limits.delta is not None:
        bounded = jnp.minimum(ratios, limits.delta)
    losses = -jnp.minimum(bounded * advantages, clipped * advantages)
    is_low = (ratios < 1 - limits.low) & (advantages < 0)
    is_high = (ratios > 1 + limits.high) & (advantages > 0)
    return PolicyLosses(losses, is_low | is_high)


def compute_cispo_losses(
    log_ratios: jax.Array, log_probs: jax.Array, advantages: jax.Array, max_ratio: float
) -> PolicyLosses:
    """Computes −sg(min(r, max_ratio))·A·log p: a token keeps its gradient, with a ratio
    that is capped (CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5)."""
    ratios = lax.stop_gradient(jnp.exp(log_ratios))
    losses = -jnp.minimum(ratios, max_ratio) * advantages * log_probs
    return PolicyLosses(losses, (ratios > max_ratio) & (advantages > 0))


def compute_sapo_losses(
    log_ratios: jax.Array, advantages: jax.Array, temperatures: SapoTemperatures
) -> PolicyLosses:
    """Computes −(4/τ)·σ(τ·(r − 1))·A: a smooth gate in place of a limit, whose gradient
    is 1 at r = 1 (SAPO, Gao et al. 2025, arXiv 2511.20347, equations 5 and 6)."""
    ratios = jnp.exp(log_ratios)
    temperature = jnp.where(
        advantages > 0, temperatures.positive, temperatures.negative
    )
    gates = jax.nn.sigmoid(temperature * (ratios - 1)) * 4 / temperature
    return PolicyLosses(-gates * advantages, jnp.zeros(ratios.shape, bool))


def compute_vespo_losses(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    sequences: PackedSequences,
    shape: VespoShape,
    log_correction_sums: jax.Array | None = None,
) -> PolicyLosses:
    """Computes −sg(φ(w))·A·log p with φ(w) = w^k·exp(λ·(1 − w)) of a sequence's ratio
    w, the product over its tokens (VESPO, arXiv 2602.10693).

    Args:
        log_correction_sums: logarithms of the ratio of the old policy to what drew the
            sequences, [..., n], by which w is multiplied; None: 0.
    """
    log_ratios = lax.stop_gradient(log_probs - old_log_probs)
    log_ratios = jnp.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_weights = sequences.sum(log_ratios)
    if log_correction_sums is not None:
        log_weights = log_weights + log_correction_sums
    log_weights = jnp.clip(log_weights, MIN_LOG_RATIO, MAX_LOG_RATIO)
    log_weights = sequences.spread(log_weights)
    is_positive = advantages >= 0
    k = jnp.where(is_positive, shape.k_positive, shape.k_negative)
    scale = jnp.where(is_positive, shape.lambda_positive, shape.lambda_negative)
    gates = jnp.exp(scale + k * log_weights - scale * jnp.exp(log_weights))
    losses = -lax.stop_gradient(gates) * advantages * log_probs
    return PolicyLosses(losses, jnp.zeros(gates.shape, bool))


def compute_sequence_clipped_losses(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    sequences: PackedSequences,
    limits: ClipLimits,
) -> tuple[jax.Array, jax.Array]:
    """Computes clipped losses of whole sequences by the product of their tokens'
    ratios, as RLOO has them (Ahmadian et al. 2024, arXiv 2402.14740), and whether a
    limit takes away the gradient: both [..., n]; 0 where no sequence is.

    Args:
        advantages: of each sequence, [..., n].
    """
    log_ratios = sequences.sum(log_probs - old_log_probs)
    losses, is_clipped = compute_clipped_losses(log_ratios, advantages, limits)
    is_present = sequences.is_present
    return jnp.where(is_present, losses, 0.0), is_clipped & is_present


def estimate_kl(
    log_probs: jax.Array, reference_log_probs: jax.Array, estimator: KlEstimator
) -> jax.Array:
    """Estimates KL(policy ‖ reference) from tokens that the policy drew, [..., S], with
    d = log p − log q: k1 = d, k2 = d²/2, k3 = exp(−d) + d − 1 (Schulman 2020,
    "Approximating KL divergence").

    All have the right size in the mean, k1 and k3 without a bias. As a loss, k2 alone
    has the gradient of the divergence on tokens that the current policy drew; k1's is 0
    in the mean, and k3's is that of KL(reference ‖ policy). Times the ratio to the old
    policy (:func:`correct_kl_bias`), k1's and k3's gradients are right too (DeepSeek-V3.2,
    arXiv 2512.02556, equation 7).
    """
    differences = log_probs - reference_log_probs
    if estimator == "k1":
        return differences
    if estimator == "k2":
        return jnp.square(differences) / 2
    return jnp.exp(-differences) + differences - 1


def correct_kl_bias(kl: jax.Array, log_ratios: jax.Array) -> jax.Array:
    """Weighs estimates of a divergence by the ratio of the current policy to the old
    one, which drew the tokens: value and gradient are then without a bias."""
    return kl * jnp.exp(log_ratios)


def sum_token_losses(
    losses: jax.Array,
    sequences: PackedSequences,
    loss_type: LossType,
    max_length: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums losses [..., S] as a type of loss averages them; returns the sum, and the
    number that it is to be divided by over the whole batch:

    - grpo, sapo: mean over a sequence's tokens, then over sequences;
    - luspo: sum over a sequence's tokens, then mean over sequences (arXiv 2602.05261);
    - dr_grpo: sum over all, divided by sequences · ``max_length``, a constant (Liu et
      al. 2025, arXiv 2503.20783);
    - bnpo, dapo, cispo, vespo: mean over all tokens.
    """
    if loss_type in ("grpo", "sapo"):
        return sequences.mean(losses).sum(), sequences.num_present
    total = sequences.total(losses)
    if loss_type == "luspo":
        return total, sequences.num_present
    if loss_type == "dr_grpo":
        return total, sequences.num_present * max_length
    return total, sequences.num_weighted


def compute_value_losses(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float | None
) -> PolicyLosses:
    """Computes ½·max((v − R)², (clip(v, v_old ± clip) − R)²) of values [..., S] (the
    clipping is that of OpenAI's PPO2; Huang et al. 2022, "The 37 implementation
    details", 9)."""
    errors = jnp.square(values - returns)
    if clip is None:
        return PolicyLosses(errors / 2, jnp.zeros(values.shape, bool))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    clipped_errors = jnp.square(clipped - returns)
    losses = jnp.maximum(errors, clipped_errors) / 2
    return PolicyLosses(losses, clipped_errors > errors)


def compute_overlong_penalty(
    num_sampled: float, max_new_tokens: int, buffer: int
) -> float:
    """Returns what a long answer's score loses, 0 to −1: none up to ``max_new_tokens``
    − ``buffer`` tokens, from there on linearly more (DAPO, arXiv 2503.14476, equation
    13)."""
    allowed = max_new_tokens - buffer
    if num_sampled <= allowed:
        return 0.0
    if num_sampled > max_new_tokens:
        return -1.0
    return (allowed - num_sampled) / buffer


def adapt_kl_coef(
    kl_coef: jax.Array,
    kl: jax.Array,
    *,
    target: float,
    horizon: float,
    num_samples: jax.Array | float,
) -> jax.Array:
    """Moves the weight of a divergence so that this comes to ``target``, both nats a
    sequence: times 1 + clip(kl / target − 1, ±0.2)·num_samples / horizon (Ziegler et
    al. 2019, arXiv 1909.08593, §2.2)."""
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
