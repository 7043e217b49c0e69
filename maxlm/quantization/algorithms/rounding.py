"""Rounding to nearest with scales that a search chooses, for any format of scaled codes.

Scales of a block are searched by clipping: the block's range is cut to parts of it, the
format gives the scales of what is left, and the one that rounds the whole block with
the least weighted error stays. It needs nothing of a format but its own rules.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from maxlm.quantization.formats.format import Planes

Scales = tuple[jax.Array, jax.Array | None]
"""Scales and zero points of blocks, of equal shapes; None: codes are symmetric."""

CLIP_RATIOS = tuple(1 - step / 40 for step in range(20))
"""Parts of a block's range that a search tries, the whole range first."""


class ScaledFormat(Protocol):
    """A format whose codes are rounded one by one, given the scales of their block."""

    @property
    def scale_block(self) -> tuple[int | None, int | None]:
        """One row, and the columns that share a scale; None: all of a row."""
        ...

    def compute_scales(self, blocks: jax.Array) -> Scales:
        """Returns the scales [...] of blocks [..., n]."""
        ...

    def round_to_codes(
        self, values: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        """Returns the codes of values, with scales that broadcast against them."""
        ...

    def decode_codes(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> jax.Array:
        """Returns the fp32 values of codes."""
        ...

    def pack(
        self, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None
    ) -> Planes:
        """Returns the planes of codes [..., R, C] and scales [..., R, blocks]."""
        ...


def round_values(
    values: jax.Array, scales: Scales, rounding: ScaledFormat
) -> jax.Array:
    """Returns what values become with these scales, which broadcast against them."""
    codes = rounding.round_to_codes(values, *scales)
    return rounding.decode_codes(codes, *scales)


def search_scales(
    blocks: jax.Array,
    rounding: ScaledFormat,
    importance: ArrayLike = 1.0,
    clip_ratios: tuple[float, ...] = CLIP_RATIOS,
) -> Scales:
    """Returns the scales [...] of blocks [..., n] with the least squared error.

    Args:
        importance: weights of the squared errors, which broadcast against the blocks.
        clip_ratios: parts of a block's range to try; of equal errors the first stays.
            ``(1.0,)`` searches nothing.
    """
    if clip_ratios == (1.0,):
        return rounding.compute_scales(blocks)

    def try_ratio(ratio: jax.Array) -> tuple[Scales, jax.Array]:
        low = ratio * jnp.minimum(blocks.min(-1, keepdims=True), 0)
        high = ratio * jnp.maximum(blocks.max(-1, keepdims=True), 0)
        scales = rounding.compute_scales(jnp.clip(blocks, low, high))
        errors = round_values(blocks, add_block_dim(scales), rounding) - blocks
        return scales, (importance * errors**2).sum(-1)

    def keep_better(
        best: tuple[Scales, jax.Array], ratio: jax.Array
    ) -> tuple[tuple[Scales, jax.Array], None]:
        scales, loss = try_ratio(ratio)
        best_scales, best_loss = best
        is_better = loss < best_loss
        kept_scales = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), scales, best_scales
        )
        return (kept_scales, jnp.minimum(loss, best_loss)), None

    ratios = jnp.asarray(clip_ratios, jnp.float32)
    (scales, _), _ = jax.lax.scan(keep_better, try_ratio(ratios[0]), ratios[1:])
    return scales


def split_blocks(values: jax.Array, block: int) -> jax.Array:
    """Returns [..., R, C] as [..., R, C / block, block]."""
    return values.reshape(*values.shape[:-1], -1, block)


def add_block_dim(scales: Scales) -> Scales:
    """Returns scales [...] as [..., 1], which broadcast against their blocks."""
    return jax.tree.map(lambda part: part[..., None], scales)


def fake_quantize(
    values: jax.Array,
    rounding: ScaledFormat,
    importance: jax.Array | None = None,
    clip_ratios: tuple[float, ...] = (1.0,),
) -> jax.Array:
    """Returns fp32 values [..., R, C], each rounded to the nearest code.

    Args:
        importance: weights [C] of the columns' squared errors in the search of scales.
        clip_ratios: see :func:`search_scales`.
    """
    block = get_block(rounding, values.shape[-1])
    blocks = split_blocks(values, block)
    weights = 1.0 if importance is None else importance.reshape(-1, block)
    scales = search_scales(blocks, rounding, weights, clip_ratios)
    return round_values(blocks, add_block_dim(scales), rounding).reshape(values.shape)


def round_to_nearest(
    values: jax.Array,
    rounding: ScaledFormat,
    importance: jax.Array | None = None,
    clip_ratios: tuple[float, ...] = (1.0,),
) -> Planes:
    """Returns the planes of fp32 values [..., R, C], each rounded to the nearest code;
    arguments are those of :func:`fake_quantize`."""
    block = get_block(rounding, values.shape[-1])
    blocks = split_blocks(values, block)
    weights = 1.0 if importance is None else importance.reshape(-1, block)
    scales = search_scales(blocks, rounding, weights, clip_ratios)
    codes = rounding.round_to_codes(blocks, *add_block_dim(scales))
    return rounding.pack(codes.reshape(values.shape), *scales)


def get_block(rounding: ScaledFormat, columns: int) -> int:
    """Returns how many of a row's ``columns`` share a scale."""
    return rounding.scale_block[1] or columns
