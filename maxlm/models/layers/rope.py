"""Rotary positions: frequencies, how they are stretched to longer sequences, and the
turn itself.

Pair i of a head's dimensions turns by position · θ_i, θ_i = theta^(−2i/R), a wavelength
of 2π·theta^(2i/R) tokens. A model that is run past the positions it has learnt meets
angles that it has not; each scaling here maps new positions to old angles in its own
way (docs/positions.md).

Shapes: B batch, S sequence, N heads, H head dim, R dimensions that turn.
"""

from math import ceil, floor, log, pi, sqrt
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from pydantic import Field, PositiveFloat, model_validator

from maxlm.config import Config, MaxlmError

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
        if self.low_freq_factor > self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is above "
                f"high_freq_factor={self.high_freq_factor}"
            )
        return self


class LongRopeScaling(Config):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753, as Phi-3's published code has it):
    the frequency of each pair of dimensions divided by a factor of its own, found by a
    search; one list for sequences up to ``original_length``, one for longer ones. A
    sequence's length is that of its row's longest document, in the engine its tokens
    that are known, so that one that grows past ``original_length`` turns by the other
    list from there on. Cosines and sines are multiplied by ``attention_factor``,
    whatever the length."""

    kind: Literal["longrope"] = "longrope"
    factor: Factor
    """The longest sequence over ``original_length``."""
    original_length: Length
    short_factors: tuple[PositiveFloat, ...]
    """One for each pair of dimensions that turns."""
    long_factors: tuple[PositiveFloat, ...]
    attention_factor: float | None = Field(default=None, gt=0)
    """null: √(1 + ln(factor) / ln(original_length))."""

    @model_validator(mode="after")
    def _same_pairs(self):
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f"{len(self.short_factors)} short_factors and "
                f"{len(self.long_factors)} long_factors: give one of each a pair"
            )
        return self


class ProportionalScaling(Config):
    """Only the fastest ``share`` of a head's pairs turn, with the frequencies that they
    have where all do; the others stay (Gemma 4's global layers). ``rotary_dim``, which
    leaves out a head's last dimensions, makes other pairs and other frequencies."""

    kind: Literal["proportional"] = "proportional"
    share: float = Field(gt=0, le=1)
    factor: Factor = 1.0
    """What all frequencies are divided by."""


Scaling = Annotated[
    LinearScaling
    | NtkScaling
    | DynamicNtkScaling
    | YarnScaling
    | Llama3Scaling
    | LongRopeScaling
    | ProportionalScaling,
    Field(discriminator="kind"),
]


class Rotary(NamedTuple):
    """Cosines and sines of every position's angles, [B, S, 1, R/2] in fp32 or wider."""

    cos: jax.Array
    sin: jax.Array


def compute_frequencies(
    theta: float, rotary_dim: int, scaling: Scaling | None = None
) -> np.ndarray:
    """Computes radians a token of each pair of dimensions, float64 [rotary_dim / 2], of
    sequences up to the original length: dynamic scaling counts as none here, LongRoPE
    has its short factors."""
    if isinstance(scaling, NtkScaling):
        theta *= scaling.factor ** (rotary_dim / (rotary_dim - 2))
    plain = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, YarnScaling):
        return _scale_yarn(plain, theta, rotary_dim, scaling)
    if isinstance(scaling, Llama3Scaling):
        return _scale_llama3(plain, scaling)
    if isinstance(scaling, LongRopeScaling):
        return plain / _list_factors(scaling.short_factors, rotary_dim)
    if isinstance(scaling, ProportionalScaling):
        num_turning = int(scaling.share * rotary_dim // 2)
        turns = np.arange(len(plain)) < num_turning
        return np.where(turns, plain / scaling.factor, 0.0)
    return plain


def _list_factors(factors: tuple[float, ...], rotary_dim: int) -> np.ndarray:
    """Returns LongRoPE's factors, float64 [rotary_dim / 2]; raises MaxlmError where
    they are not so many."""
    if 2 * len(factors) != rotary_dim:
        raise MaxlmError(
            f"{len(factors)} factors of longrope for {rotary_dim} dimensions that turn",
            where="positions.scaling",
            fix=f"give {rotary_dim // 2}, one a pair",
        )
    return np.array(factors)


def resize_scaling(scaling: Scaling | None, rotary_dim: int) -> Scaling | None:
    """Returns the scaling for ``rotary_dim`` dimensions that turn: LongRoPE's factors are
    spread over, or picked from, as many pairs."""
    if not isinstance(scaling, LongRopeScaling):
        return scaling
    num_old = len(scaling.short_factors)
    pairs = np.arange(rotary_dim // 2) * num_old // (rotary_dim // 2)
    return scaling.model_copy(
        update={
            "short_factors": tuple(scaling.short_factors[pair] for pair in pairs),
            "long_factors": tuple(scaling.long_factors[pair] for pair in pairs),
        }
    )


def _scale_yarn(
    plain: np.ndarray, theta: float, rotary_dim: int, scaling: YarnScaling
) -> np.ndarray:
    """Scales frequencies as eq. 17–20 of Peng et al. 2023 say."""

    def find_pair(turns: float) -> float:
        """Returns the pair of dimensions that turns so often in the original length."""
        tokens_per_radian = scaling.original_length / (turns * 2 * pi)
        return rotary_dim * log(tokens_per_radian) / (2 * log(theta))

    low = find_pair(scaling.beta_fast)
    high = find_pair(scaling.beta_slow)
    if scaling.truncate:
        low = floor(low)
        high = ceil(high)
    low = max(low, 0)
    high = min(high, rotary_dim - 1)
    ramp_length = high - low or 0.001
    # 0: as trained; 1: interpolated.
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / ramp_length, 0, 1)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def _scale_llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_length * plain / (2 * pi)
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    # 1: as trained; 0: stretched.
    if low == high:  # Llama 4 Scout: nothing is mixed
        unchanged = np.where(turns < low, 0.0, 1.0)
    else:
        unchanged = np.clip((turns - low) / (high - low), 0, 1)
    return plain * unchanged + plain / scaling.factor * (1 - unchanged)


def compute_yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns the factor by which YaRN sharpens attention (Peng et al. 2023, eq.
    22)."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def rope_attention_factor(scaling: Scaling | None) -> float:
    """Returns the factor on cosines and sines."""
    if isinstance(scaling, LongRopeScaling):
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        return sqrt(1 + log(scaling.factor) / log(scaling.original_length))
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor = scaling.factor
    if scaling.mscale and scaling.mscale_all_dim:
        rotary_mscale = compute_yarn_mscale(factor, scaling.mscale)
        return rotary_mscale / compute_yarn_mscale(factor, scaling.mscale_all_dim)
    return compute_yarn_mscale(factor)


def compute_rotary(
    positions: jax.Array,
    rotary_dim: int,
    theta: float,
    scaling: Scaling | None = None,
    dtype: DTypeLike = jnp.float32,
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
    frequencies = compute_frequencies(theta, rotary_dim, scaling).astype(dtype)
    if isinstance(scaling, DynamicNtkScaling | LongRopeScaling) and lengths is None:
        lengths = 1 + positions.max(axis=1, keepdims=True)
    if isinstance(scaling, DynamicNtkScaling):
        assert lengths is not None
        frequencies = _compute_dynamic_frequencies(
            theta, rotary_dim, scaling, lengths, dtype
        )
    elif isinstance(scaling, LongRopeScaling):
        assert lengths is not None
        plain = compute_frequencies(theta, rotary_dim)
        long = plain / _list_factors(scaling.long_factors, rotary_dim)
        is_long = (lengths > scaling.original_length)[..., None, None]
        frequencies = jnp.where(is_long, long.astype(dtype), frequencies)
    angles = positions[..., None, None].astype(dtype) * frequencies
    scale = rope_attention_factor(scaling)
    return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def _compute_dynamic_frequencies(
    theta: float,
    rotary_dim: int,
    scaling: DynamicNtkScaling,
    lengths: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """Computes radians a token, [B, S, 1, R/2]: each token's by its sequence's length
    (Peng et al. 2023, §3.3)."""
    length = jnp.maximum(lengths, scaling.original_length).astype(dtype)
    length = length[..., None, None]
    stretch = scaling.factor * length / scaling.original_length
    factor = stretch - (scaling.factor - 1)
    base = theta * factor ** (rotary_dim / (rotary_dim - 2))
    exponents = -jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim
    return base**exponents


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
    rotary_dim = 2 * rotary.cos.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x[..., :rotary_dim], 2, axis=-1)
    first = first.astype(wide)
    second = second.astype(wide)
    turned_first = first * rotary.cos - second * rotary.sin
    turned_second = second * rotary.cos + first * rotary.sin
    rest = [x[..., rotary_dim:]] if rotary_dim < x.shape[-1] else []
    return jnp.concatenate(
        [turned_first.astype(x.dtype), turned_second.astype(x.dtype), *rest], axis=-1
    )


def _rotate_forward(x: jax.Array, rotary: Rotary) -> tuple[jax.Array, Rotary]:
    return rotate(x, rotary), rotary


def _rotate_backward(rotary: Rotary, d_y: jax.Array) -> tuple[jax.Array, None]:
    # A rotation's transpose is the rotation back.
    return rotate(d_y, Rotary(rotary.cos, -rotary.sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
