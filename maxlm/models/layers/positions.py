"""Positions of tokens; the rotary ones are in ``rope.py``."""

from math import floor, log2
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from maxlm.config import Config
from maxlm.models.layers.rope import Scaling


class PositionsConfig(Config):
    kind: Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"] = "rope"
    """rope turns queries and keys by their position; learned adds a table of
    max_seq_len rows to the embedding, and cannot go past it; sinusoidal adds fixed
    waves; alibi takes from each score in proportion to distance; relative adds a learnt
    bias by distance to each score; none leaves order to the causal mask."""
    theta: float = Field(default=10_000.0, gt=1)
    """RoPE's base: the longest wavelength is about 2π·theta tokens."""
    rotary_dim: int | None = Field(default=None, gt=0)
    """Dimensions of a head that RoPE turns, the first ones; null: all."""
    scaling: Scaling | None = None
    """Stretching of RoPE past the length a model was trained at."""
    offset: int = Field(default=0, ge=0)
    """Rows before position 0's in a learnt table (BART has 2)."""
    max_bias: float = Field(default=8.0, gt=0)
    """ALiBi's smallest slope is 2^−max_bias."""
    buckets: int = Field(default=32, gt=3)
    """relative: learnt values a head, shared by distances that are alike."""
    max_distance: int = Field(default=128, gt=1)
    """relative: distances from here on are alike."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.kind == "relative" and self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"max_distance={self.max_distance} is not beyond the "
                f"{self.buckets // 2} distances with a bucket each"
            )
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(
                f"rope turns pairs of dimensions: rotary_dim={self.rotary_dim} is odd"
            )
        return self


def compute_alibi_slopes(num_heads: int, max_bias: float = 8.0) -> np.ndarray:
    """Computes slopes, float32 [N] (Press et al. 2022, arXiv 2108.12409, §3):
    2^(−max_bias·i/n), i = 1..n, for n heads, a power of two; further heads take every
    other slope of twice as many."""
    n = 2 ** floor(log2(num_heads))
    slopes = 2.0 ** (-max_bias * np.arange(1, n + 1) / n)
    # Of the slopes of 2n heads those between: i = 1, 3, 5, ...
    slopes_between = 2.0 ** (-max_bias * np.arange(1, 2 * n, 2) / (2 * n))
    all_slopes = np.concatenate([slopes, slopes_between])
    return all_slopes[:num_heads].astype(np.float32)


def compute_sinusoids(positions: jax.Array, d_model: int) -> jax.Array:
    """Computes sines and cosines of position / 10000^(2i/D), by turns, fp32 [..., D]
    (Vaswani 2017, §3.5)."""
    even_dims = np.arange(0, d_model, 2)  # 2i
    rates = 10_000.0 ** (-even_dims / d_model)
    angles = positions[..., None].astype(jnp.float32) * rates.astype(np.float32)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [..., D / 2, 2]
    # An odd D has no cosine of its last rate.
    return waves.reshape(*positions.shape, -1)[..., :d_model]


def compute_relative_buckets(config: PositionsConfig, *, causal: bool) -> np.ndarray:
    """Computes the bucket of each distance key − query from −max_distance to
    max_distance, int [2·max_distance + 1] (Raffel et al. 2020, arXiv 1910.10683, §2.1,
    and its published code).

    Half of the buckets are for one distance each, the others grow with its logarithm.
    Without ``causal`` keys before and after the query have half of them each.
    """
    reach = config.max_distance
    num_buckets = config.buckets
    distance = np.arange(-reach, reach + 1)
    if causal:
        first_bucket = np.zeros_like(distance)
        distance = np.maximum(-distance, 0)
    else:
        num_buckets //= 2
        first_bucket = np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)

    # Far buckets: e + ⌊log(distance / e) / log(reach / e) · (b − e)⌋ of b buckets, of
    # which e are exact. In fp32, as where weights were trained: a distance on a border
    # must fall on the same side.
    num_exact = num_buckets // 2
    num_far = num_buckets - num_exact
    at_least_1 = np.maximum(distance, 1).astype(np.float32)  # the log of 0 is none
    log_ratio = np.log(at_least_1 / np.float32(num_exact))
    log_reach = np.float32(np.log(reach / num_exact))
    far_index = (log_ratio / log_reach * np.float32(num_far)).astype(int)
    far_bucket = np.minimum(num_exact + far_index, num_buckets - 1)
    bucket = np.where(distance < num_exact, distance, far_bucket)
    return first_bucket + bucket


def compute_relative_biases(
    table: jax.Array, config: PositionsConfig, *, causal: bool
) -> jax.Array:
    """Looks up [N, 2·max_distance + 1], by distance, in the table [buckets, N];
    differentiable."""
    buckets = compute_relative_buckets(config, causal=causal)
    one_hot = np.eye(config.buckets, dtype=np.float32)[buckets]  # [distances, buckets]
    # A product and not a gather: its gradient is one too, and exact, as a row has one
    # 1.
    return jnp.einsum("rb,bn->nr", one_hot, table, precision=jax.lax.Precision.HIGHEST)
