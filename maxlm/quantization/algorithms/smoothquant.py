"""SmoothQuant: moves the outliers of activations into the weights, so that both fit in
eight bits (Xiao et al. 2022, arXiv 2211.10438)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

LEAST_MAXIMUM = 1e-5


def compute_smoothing_scales(
    weights: Sequence[jax.Array], maximum: jax.Array, alpha: float = 0.5
) -> jax.Array:
    """Returns fp32 [C]: max|x|^α / max|w|^(1-α) of matrices [R, C] that read the same
    inputs, such as those of a norm (equation 4 there).

    The matrices are multiplied by the scales; the norm's weight, and its bias, are
    divided by them. Channels of zeros, in inputs or in weights, get one.

    Args:
        maximum: max|x| over tokens, [C].
        alpha: how much of the difficulty goes to the weights: 0.5 fits most models, up
            to 0.9 those with more outliers.
    """
    by_matrix = jnp.stack([jnp.abs(weight).max(0) for weight in weights])
    weight_maximum = by_matrix.max(0).astype(jnp.float32)
    maximum = maximum.astype(jnp.float32)
    scales = jnp.maximum(maximum, LEAST_MAXIMUM) ** alpha
    scales = scales / jnp.maximum(weight_maximum, LEAST_MAXIMUM) ** (1 - alpha)
    is_live = (maximum > 0) & (weight_maximum > 0)
    return jnp.where(is_live, jnp.maximum(scales, LEAST_MAXIMUM), 1.0)
