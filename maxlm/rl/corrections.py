"""Corrections of samples that other probabilities drew than the trainer's: those of an
engine that computes otherwise, or of older parameters.

Three policies take part (Hilton et al. 2022, arXiv 2110.00641): the one that *drew* the
tokens, the *old* one, from which an update starts, and the *current* one. A loss clips
the ratio of the current to the old; what stands here weighs samples by the ratio of the
old to the one that drew them. All is computed per sequence or per token of packed rows,
and no gradient passes through.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.rl.sequences import PackedSequences

Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]
MIN_LOG_RATIO = math.log(1e-8)
"""Least logarithm of a ratio that :func:`compute_correction` sums up: of a masked
sample it would be infinite."""
MAX_LOG_RATIO = 20.0


class CorrectionWeights(NamedTuple):
    """Weights of samples by how likely the trainer is to draw them, beside what drew
    them."""

    per_token: jax.Array
    """Ratios, truncated or 0 where masked, fp32 [..., S]."""
    log_sums: jax.Array
    """Sum over a sequence of the ratios' logarithms, fp32 [..., n]; of a ratio for the
    sequence, its logarithm."""
    masked: jax.Array
    """Whether a ratio is outside of the limits, bool [..., S]."""


def compute_correction(
    old_log_probs: jax.Array,
    sampled_log_probs: jax.Array,
    sequences: PackedSequences,
    correction: Correction,
    *,
    cap: float | None,
    floor: float | None = None,
) -> CorrectionWeights:
    """Computes importance weights exp(old − sampled) of tokens, or of whole sequences
    by the sum of their tokens' log-ratios (not their mean, which would be biased).

    Truncated ones are held between ``floor`` and ``cap`` (TIS, Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"); masked ones are
    0 outside of these and left as they are within (MIS, Liu et al. 2025, "When speed
    kills stability").

    Args:
        old_log_probs: the trainer's, fp32 [..., S], in nats.
        sampled_log_probs: of what drew the tokens, likewise. NaN: unknown, a ratio of
            1.
        cap, floor: limits of a ratio; None: none.
    """
    differences = lax.stop_gradient(old_log_probs - sampled_log_probs)
    differences = jnp.where(jnp.isnan(differences), 0.0, differences)
    differences = jnp.where(sequences.weights != 0, differences, 0.0)
    is_of_sequence = correction.startswith("sequence")
    if correction == "none":
        differences = jnp.zeros_like(differences)
    if is_of_sequence:
        differences = sequences.spread(sequences.sum(differences))
    ratios = jnp.exp(differences)
    least = 0.0 if floor is None else floor
    most = math.inf if cap is None else cap
    is_outside = (ratios < least) | (ratios > most)
    if correction.endswith("mask"):
        ratios = jnp.where(is_outside, 0.0, ratios)
    else:
        ratios = jnp.clip(ratios, least, most)
    log_ratios = jnp.clip(jnp.log(ratios), MIN_LOG_RATIO, MAX_LOG_RATIO)
    if is_of_sequence:
        log_sums = sequences.mean(log_ratios)
    else:
        log_sums = sequences.sum(log_ratios)
    return CorrectionWeights(ratios, log_sums, is_outside)


def mask_off_policy_sequences(
    log_probs: jax.Array,
    sampled_log_probs: jax.Array,
    advantages: jax.Array,
    sequences: PackedSequences,
    threshold: float,
) -> jax.Array:
    """Returns 0 for tokens with a negative advantage of sequences that the policy has
    moved away from, by more than ``threshold`` nats a token on average, else 1: [...,
    S] (DeepSeek-V3.2, arXiv 2512.02556, §3.1, equations 8 and 9)."""
    differences = lax.stop_gradient(sampled_log_probs - log_probs)
    differences = jnp.where(jnp.isnan(differences), 0.0, differences)
    divergence = sequences.spread(sequences.mean(differences))
    is_kept = (advantages >= 0) | (divergence <= threshold)
    return is_kept.astype(jnp.float32)
