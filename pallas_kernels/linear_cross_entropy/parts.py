"""Shared parts of the implementations: the sums of the loss, and the types of results."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Sums: TypeAlias = tuple[jax.Array, jax.Array]
"""The loss with the z term and the cross-entropy without it."""


class CrossEntropyGradients(NamedTuple):
    """Gradients of the first sum, in the arguments' shapes and dtypes."""

    hidden: jax.Array
    head: jax.Array
    bias: jax.Array | None


Loss: TypeAlias = tuple[Sums, CrossEntropyGradients | None]


def reduce_logsumexp(own: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """log Σ exp over the devices along mesh axes."""
    if not axes:
        return own
    top = lax.pmax(own, axes)
    return top + jnp.log(lax.psum(jnp.exp(own - top), axes))


def sum_losses(
    logsumexp: jax.Array, target: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[Sums, jax.Array]:
    """Returns the sums, from tokens' log-sum-exps and target logits, fp32 [T], and the derivative
    of the first in the log-sum-exps. (Its derivative in the target logits is −weights.)"""
    entropy = jnp.sum(weights * (logsumexp - target))
    loss = entropy + z_loss * jnp.sum(weights * jnp.square(logsumexp))
    return (loss, entropy), weights * (1.0 + 2.0 * z_loss * logsumexp)


def apply_soft_cap(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap · tanh(logits / soft_cap)."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits * (1.0 / soft_cap))


def soft_cap_gradient(logits: jax.Array, soft_cap: float | None) -> jax.Array | float:
    """Returns the derivative of :func:`apply_soft_cap`, from its result."""
    return 1.0 if soft_cap is None else 1.0 - jnp.square(logits * (1.0 / soft_cap))
