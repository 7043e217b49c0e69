"""How a model knows where a token stands."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from pydantic import Field

from maxlm.config import Config


class PositionsConfig(Config):
    kind: Literal["rope", "learned", "none"] = "rope"
    """rope rotates queries and keys by their position; learned adds a table of max_seq_len rows
    to the embedding, and cannot go past it; none leaves order to the causal mask."""
    theta: float = Field(default=10_000.0, gt=0)
    """RoPE's base: the longest wavelength is about 2π·theta tokens."""


class Rotary(NamedTuple):
    """Cosines and sines of every position's angles, fp32 [B, S, 1, H/2]."""

    cos: jax.Array
    sin: jax.Array


def rotary(positions: jax.Array, head_dim: int, theta: float) -> Rotary:
    """Angles of rotary embeddings (Su et al. 2021, eq. 15): θ_i = theta^(−2i/H).

    Args:
        positions: int [B, S].
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return Rotary(jnp.cos(angle), jnp.sin(angle))


@jax.custom_vjp
def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate x [B, S, N, H]; dimension i pairs with i + H/2 (the layout of published weights).
    Differentiable in x."""
    # Or the map that made x writes its fp32 sums out, twice the bytes, for the fp32 that follows.
    x = lax.optimization_barrier(x)
    a, b = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    turned = (a * rotary.cos - b * rotary.sin, b * rotary.cos + a * rotary.sin)
    return jnp.concatenate([half.astype(x.dtype) for half in turned], axis=-1)


def _rotate_forward(x: jax.Array, rotary: Rotary) -> tuple[jax.Array, Rotary]:
    return rotate(x, rotary), rotary


def _rotate_backward(rotary: Rotary, d_y: jax.Array) -> tuple[jax.Array, None]:
    return rotate(d_y, Rotary(rotary.cos, -rotary.sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
