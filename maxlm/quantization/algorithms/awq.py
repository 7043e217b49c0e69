"""AWQ: scales input channels so that those of weight are rounded finely, and clips
groups (Lin et al. 2023, arXiv 2306.00978).

Matrices that read the same inputs x share scales s [C]: x / s goes into W · s, which is
what gets rounded. The layer before takes 1 / s into its own outputs. A search over a
grid finds the s that changes the outputs least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.quantization.algorithms.hessian import compute_proxy_loss, rescale_hessian
from maxlm.quantization.algorithms.rounding import (
    CLIP_RATIOS,
    ScaledFormat,
    add_block_dim,
    fake_quantize,
    get_block,
    round_values,
    split_blocks,
)

LEAST_SCALE = 1e-4
MeasureOutputs = Callable[[Sequence[jax.Array]], float]
"""Of the matrices as they would be, in the order given: the error of what is made of
their outputs, such as a block's."""


@dataclass(frozen=True)
class AwqConfig:
    """Settings of :func:`search_channel_scales`."""

    grid: int = 20
    """Exponents tried: 0, 1/grid, ... below 1."""
    uses_weights: tuple[bool, ...] = (True, False)
    """Which rules are tried: true, mean|x|^α / mean|w|^(1-α), with w as a part of its
    group's largest; false, mean|x|^α."""
    clip_ratios: tuple[float, ...] = (1.0,)
    """Parts of a block's range that the rounding within the search tries: those that
    the rounding in the end will try."""


class AwqScales(NamedTuple):
    """Scales of input channels that a search chose."""

    scales: jax.Array
    """fp32 [C]: the matrices are multiplied by them, their inputs divided."""
    loss: float
    """The error of the outputs with them."""
    plain_loss: float
    """The error with scales of one."""
    exponent: float
    """α of the best scales; 0 of scales of one."""


def search_channel_scales(
    weights: Sequence[jax.Array],
    hessian: jax.Array,
    magnitude: jax.Array,
    rounding: ScaledFormat,
    config: AwqConfig = AwqConfig(),
    measure_outputs: MeasureOutputs | None = None,
) -> AwqScales:
    """Searches the scales of matrices [R, C] that read the same inputs. Scales of one
    are among those tried.

    Args:
        hessian: the mean of x xᵀ [C, C].
        magnitude: the mean of |x| [C].
        measure_outputs: the error to minimize; without it, that of the matrices' own
            outputs, tr(ΔW H ΔWᵀ) over all of them.
    """
    block = get_block(rounding, hessian.shape[0])
    weight_magnitude = _measure_weights(weights, block)
    candidates = [jnp.ones_like(magnitude)]
    exponents = [0.0]
    for uses_weights in config.uses_weights:
        for step in range(config.grid):
            exponent = step / config.grid
            divisor = weight_magnitude if uses_weights else None
            candidates.append(propose_scales(magnitude, divisor, exponent))
            exponents.append(exponent)
    if measure_outputs is None:
        losses = _measure_proxy_losses(
            tuple(weights),
            hessian,
            jnp.stack(candidates),
            rounding,
            config.clip_ratios,
        )
    else:
        losses = []
        for scales in candidates:
            rounded = [
                _round_scaled(weight, scales, hessian, rounding, config.clip_ratios)
                for weight in weights
            ]
            losses.append(measure_outputs(rounded))
    losses = np.asarray(losses, np.float64)
    best = int(np.nanargmin(losses))
    return AwqScales(
        candidates[best], float(losses[best]), float(losses[0]), exponents[best]
    )


@jax.jit
def propose_scales(
    magnitude: jax.Array, weight_magnitude: jax.Array | None, exponent: float
) -> jax.Array:
    """Returns scales [C]: magnitude^α / weight_magnitude^(1-α), such that the largest
    times the smallest is one. Channels that no input reaches get one.

    Args:
        magnitude: the mean of |x| [C].
        weight_magnitude: the mean of |w| [C] over outputs; None: not divided by.
    """
    is_live = magnitude > 0
    scales = jnp.maximum(magnitude, LEAST_SCALE) ** exponent
    if weight_magnitude is not None:
        scales = scales / (weight_magnitude ** (1 - exponent) + LEAST_SCALE)
    scales = jnp.maximum(scales, LEAST_SCALE)
    high = jnp.where(is_live, scales, 0).max()
    low = jnp.where(is_live, scales, jnp.inf).min()
    return jnp.where(is_live, scales / jnp.sqrt(high * low), 1.0)


@partial(jax.jit, static_argnames=("rounding", "clip_ratios"))
def search_clip(
    weight: jax.Array,
    hessian: jax.Array,
    rounding: ScaledFormat,
    clip_ratios: tuple[float, ...] = CLIP_RATIOS,
) -> jax.Array:
    """Returns the largest |w| that each group of a matrix [R, C] keeps, fp32 [R, C /
    group]: of parts of its range, the one that changes least what the group adds to the
    outputs. Of scaled matrices with the Hessian of scaled inputs."""
    block = get_block(rounding, weight.shape[1])
    blocks = split_blocks(weight, block)
    starts = jnp.arange(blocks.shape[1]) * block
    cut = jax.vmap(
        lambda start: jax.lax.dynamic_slice(hessian, (start, start), (block, block))
    )
    hessians = cut(starts)
    largest = jnp.abs(blocks).max(-1)

    def keep_better(
        best: tuple[jax.Array, jax.Array], ratio: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        limits = ratio * largest
        clipped = jnp.clip(blocks, -limits[..., None], limits[..., None])
        scales = rounding.compute_scales(clipped)
        errors = round_values(clipped, add_block_dim(scales), rounding) - blocks
        outputs = jnp.einsum(
            "rgi,gij->rgj", errors, hessians, precision=jax.lax.Precision.HIGHEST
        )
        losses = (outputs * errors).sum(-1)
        is_better = losses < best[1]
        limits = jnp.where(is_better, limits, best[0])
        return (limits, jnp.where(is_better, losses, best[1])), None

    first = (largest, jnp.full(largest.shape, jnp.inf))
    ratios = jnp.asarray(clip_ratios, jnp.float32)
    (limits, _), _ = jax.lax.scan(keep_better, first, ratios)
    return limits


def clip_groups(weight: jax.Array, limits: jax.Array) -> jax.Array:
    """Returns a matrix [R, C] cut to ±limits [R, groups] of its groups."""
    limits = jnp.repeat(limits, weight.shape[1] // limits.shape[1], axis=1)
    return jnp.clip(weight, -limits, limits)


def _measure_weights(weights: Sequence[jax.Array], block: int) -> jax.Array:
    """Returns [C]: the mean over all outputs of |w| as a part of its group's largest."""
    total = jnp.zeros(weights[0].shape[1])
    for weight in weights:
        blocks = jnp.abs(split_blocks(weight, block))
        largest = jnp.maximum(blocks.max(-1, keepdims=True), jnp.finfo("float32").tiny)
        total = total + (blocks / largest).reshape(weight.shape).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


@partial(jax.jit, static_argnames=("rounding", "clip_ratios"))
def _round_scaled(
    weight: jax.Array,
    scales: jax.Array,
    hessian: jax.Array,
    rounding: ScaledFormat,
    clip_ratios: tuple[float, ...],
) -> jax.Array:
    """Returns Q(W · s) / s."""
    importance = jnp.diagonal(rescale_hessian(hessian, scales))
    return fake_quantize(weight * scales, rounding, importance, clip_ratios) / scales


@partial(jax.jit, static_argnames=("rounding", "clip_ratios"))
def _measure_proxy_losses(
    weights: tuple[jax.Array, ...],
    hessian: jax.Array,
    candidates: jax.Array,
    rounding: ScaledFormat,
    clip_ratios: tuple[float, ...],
) -> jax.Array:
    """Returns [n]: the errors of the outputs with each of the scales [n, C]."""

    def measure(scales: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for weight in weights:
            rounded = _round_scaled(weight, scales, hessian, rounding, clip_ratios)
            total = total + compute_proxy_loss(weight - rounded, hessian)
        return total

    return jax.lax.map(measure, candidates)
