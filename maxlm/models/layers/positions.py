"""How a model knows where a token stands."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
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


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate x [B, S, N, H]; dimension i pairs with i + H/2 (the layout of published weights)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (a * rotary.cos - b * rotary.sin, b * rotary.cos + a * rotary.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
