"""Rotary positions: frequencies, how they are stretched to longer sequences, and the
turn itself.

Pair i of a head's dimensions turns by position · θ_i, θ_i = theta^(−2i/R), a wavelength
of 2π·theta^(2i/R) tokens. A model that is run past the positions it has learnt meets
angles that it has not; each scaling here maps new positions to old angles in its own
way (docs/positions.md).
"""

from functools import partial
from math import ceil, floor, log, pi
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from pydantic import Field, model_validator

from maxlm.config import Config

Factor = Annotated[float, Field(ge=1)]
Length = Annotated[int, Field(gt=0)]


class LinearScaling(Config):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595, eq. 4): every
    frequency divided by ``factor``. Needs a little fine-tuning; blurs the finest
    distances."""

    kind: Literal["linear"] = "linear"
    factor: Factor


class NtkScaling(Config):
    """NTK-aware: theta becomes theta · factor^(R/(R−2)), so that the longest wavelength
    grows by ``factor`` and the shortest not at all (Peng et al. 2023, arXiv 2309.00071,
    eq. 16). Works somewhat without fine-tuning."""

    kind: Literal["ntk"] = "ntk"
    factor: Factor


class DynamicNtkScaling(Config):
    """NTK-aware with the factor that the sequence at hand needs: factor · n /
    original_length − (factor − 1) for n tokens, none up to ``original_length`` (Peng et
    al. 2023, §3.3). n is the row's longest document, so short sequences are computed as
    before."""

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: Factor
    original_length: Length


class YarnScaling(Config):
    """YaRN (Peng et al. 2023, eq. 17–22): dimensions that turn more than ``beta_fast``
    times in ``original_length`` tokens stay, those that turn less than ``beta_slow``
    times are interpolated, a ramp lies between; and attention is sharpened."""

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_length: Length
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    """Factor on cosines and sines, hence its square on scores; null: 0.1·ln(factor) +
    1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """DeepSeek's two: cosines and sines are multiplied by m(mscale) /
    m(mscale_all_dim), scores of latent attention by m(mscale_all_dim)², with m(s) =
    0.1·s·ln(factor) + 1."""
    truncate: bool = True
    """Round the ramp's ends to whole dimensions."""


class Llama3Scaling(Config):
    """Llama 3.1's: wavelengths above original_length / low_freq_factor are stretched by
    ``factor``, those below original_length / high_freq_factor stay, frequencies between
    are mixed (its published code; Llama Team 2024, arXiv 2407.21783, §3.4.2, tells of
    the training)."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_length: Length

    @model_validator(mode="after")
    def _in_order(self):
        if self.low_freq_factor >= self.high_freq_factor:
            high = f"high_freq_factor={self.high_freq_factor}"
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is not below {high}"
            )
        return self


Scaling = Annotated[
    LinearScaling | NtkScaling | DynamicNtkScaling | YarnScaling | Llama3Scaling,
    Field(discriminator="kind"),
]


class Rotary(NamedTuple):
    """Cosines and sines of every position's angles, [B, S, 1, R/2] in fp32 or wider."""

    cos: jax.Array
    sin: jax.Array


def compute_frequencies(
    theta: float, rotary_dim: int, scaling: Any = None
) -> np.ndarray:
    """Computes radians a token of each pair of dimensions, float64 [rotary_dim / 2], of
    any scaling but the dynamic one, which counts as none here."""
    if isinstance(scaling, NtkScaling):
        theta *= scaling.factor ** (rotary_dim / (rotary_dim - 2))
    plain = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, theta, rotary_dim, scaling)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    return plain


def _yarn(
    plain: np.ndarray, theta: float, size: int, scaling: YarnScaling
) -> np.ndarray:
    def dimension(turns: float) -> float:
        """Returns the pair of dimensions that turns so often in the original length."""
        return size * log(scaling.original_length / (turns * 2 * pi)) / (2 * log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low = floor(low)
        high = ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    stretched = np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
    return plain * (1 - stretched) + plain / scaling.factor * stretched


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_length * plain / (2 * pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def compute_yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns the factor by which YaRN sharpens attention (Peng et al. 2023, eq.
    22)."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def rope_attention_factor(scaling: Any) -> float:
    """Returns the factor on cosines and sines."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        of = partial(compute_yarn_mscale, scaling.factor)
        return of(scaling.mscale) / of(scaling.mscale_all_dim)
    return compute_yarn_mscale(scaling.factor)


def compute_rotary(
    positions: jax.Array,
    rotary_dim: int,
    theta: float,
    scaling: Any = None,
    dtype: Any = jnp.float32,
    *,
    lengths: jax.Array | None = None,
) -> Rotary:
    """Computes angles of rotary embeddings (Su et al. 2021, eq. 15).

    Args:
        positions: int [B, S].
        rotary_dim: R, the dimensions that are turned; even.
        dtype: of angles, cosines and sines; fp32 or wider.
        lengths: int [B, S], the tokens of each token's sequence; None: one more than a
            row's last position.
    """
    turns: Any = compute_frequencies(theta, rotary_dim, scaling).astype(dtype)
    if isinstance(scaling, DynamicNtkScaling):
        lengths = (
            1 + positions.max(axis=1, keepdims=True) if lengths is None else lengths
        )
        length = jnp.maximum(lengths, scaling.original_length).astype(dtype)[
            ..., None, None
        ]
        factor = scaling.factor * length / scaling.original_length - (
            scaling.factor - 1
        )
        base = theta * factor ** (rotary_dim / (rotary_dim - 2))
        turns = base ** (-jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
    angle = positions[..., None, None].astype(dtype) * turns
    scale = rope_attention_factor(scaling)
    return Rotary(jnp.cos(angle) * scale, jnp.sin(angle) * scale)


def materialize_rotary(rotary: Rotary) -> Rotary:
    """Makes angles arrays of their own, by a product with the identity, which is exact.
    XLA's CPU compiler computes cosines anew in each fusion that reads them, and so for
    each layer that is not in a loop and each head; it removes barriers before it fuses,
    and products it does not fuse."""
    identity = jnp.eye(rotary.cos.shape[-1], dtype=rotary.cos.dtype)
    return Rotary(rotary.cos @ identity, rotary.sin @ identity)


@jax.custom_vjp
def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns the first R dimensions of x [B, S, N, H], i with i + R/2. Differentiable in
    x."""
    # Or the map that made x writes its fp32 sums out, twice the bytes, for the fp32
    # that follows.
    x = lax.optimization_barrier(x)
    size = 2 * rotary.cos.shape[-1]
    precise = jnp.promote_types(x.dtype, jnp.float32)
    a, b = (half.astype(precise) for half in jnp.split(x[..., :size], 2, axis=-1))
    turned = (a * rotary.cos - b * rotary.sin, b * rotary.cos + a * rotary.sin)
    rest = [x[..., size:]] if size < x.shape[-1] else []
    return jnp.concatenate([*(half.astype(x.dtype) for half in turned), *rest], axis=-1)


rotate.defvjp(
    lambda x, rotary: (rotate(x, rotary), rotary),
    lambda rotary, d_y: (rotate(d_y, Rotary(rotary.cos, -rotary.sin)), None),
)
