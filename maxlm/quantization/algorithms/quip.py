"""QuIP#: random rotations that leave no outliers, and rounding to a lattice with the
errors made up for (Tseng et al. 2024, arXiv 2402.04396).

With transforms T of inputs and outputs, W̃ = T_out W T_inᵀ and H̃ = T_in H T_inᵀ; W̃ / s is
rounded to vectors of a codebook, eight columns at a time (block LDLQ). A product is then
y = T_outᵀ (s · Ŵ (T_in x)): :func:`transform_inputs`, the codes' product, and
:func:`restore_outputs`.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from maxlm.config.errors import MaxlmError
from maxlm.quantization.algorithms.compensation import (
    RUN,
    damp_hessian,
    matmul,
    refine_rounding,
    round_blocks,
    round_in_runs,
)
from maxlm.quantization.algorithms.hadamard import (
    apply_transform,
    draw_signs,
    undo_transform,
)
from maxlm.quantization.algorithms.hessian import compute_proxy_loss

WIDTH = 8
"""Numbers that one code stands for."""


class VectorCodebook(Protocol):
    """Vectors of eight numbers and their codes, for values of variance near one."""

    def encode(self, vectors: jax.Array) -> jax.Array:
        """Returns the codes [...] of the vectors [..., 8] of the codebook nearest to
        these."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns the vectors [..., 8] of codes [...]."""
        ...


@dataclass(frozen=True)
class QuipConfig:
    """Settings of :func:`quantize_quip`."""

    damping: float = 0.01
    """Added to diag(H), as a part of its mean."""
    root_mean_square: float = 0.95
    """Of W̃ / s when it is rounded. E8P rounds Gaussian numbers best at 1.03; errors
    that are made up for widen them."""
    refine_passes: int = 3
    """Passes that round each eight columns once more, given all others; each follows a
    new choice of the scale s. Each takes as long as the rounding itself."""


class QuipResult(NamedTuple):
    """A matrix that QuIP# rounded."""

    codes: jax.Array
    """[R, C / 8], of the codebook's dtype."""
    scale: jax.Array
    """fp32 []: s."""
    input_signs: jax.Array
    """fp32 [C] of ±1, the signs of T_in."""
    output_signs: jax.Array
    """fp32 [R] of ±1, the signs of T_out."""
    values: jax.Array
    """fp32 [R, C]: the matrix that all of this stands for, not transformed."""
    loss: jax.Array
    """fp32: tr(ΔW H ΔWᵀ), without damping."""


def quantize_quip(
    weight: jax.Array,
    hessian: jax.Array,
    codebook: VectorCodebook,
    seed: int | jax.Array,
    config: QuipConfig = QuipConfig(),
) -> QuipResult:
    """Rounds an fp32 matrix [R, C] whose inputs have the mean of x xᵀ [C, C].

    Args:
        codebook: hashable, compared by value.
        seed: of the signs, which the result has as well.

    Raises:
        MaxlmError: C is not divisible by 8.
    """
    if weight.shape[1] % WIDTH:
        raise MaxlmError(
            f"{weight.shape[1]} input channels are not divisible by {WIDTH}",
            fix="choose a format of scaled integers for this matrix",
        )
    return _quantize(weight, hessian, codebook, jnp.uint32(seed), config)


@partial(jax.jit, static_argnames=("codebook", "config"))
def _quantize(
    weight: jax.Array,
    hessian: jax.Array,
    codebook: VectorCodebook,
    seed: jax.Array,
    config: QuipConfig,
) -> QuipResult:
    rows, columns = weight.shape
    input_signs = draw_signs(2 * seed, columns)
    output_signs = draw_signs(2 * seed + 1, rows)
    weight = weight.astype(jnp.float32)
    rotated = transform_matrix(weight, input_signs, output_signs)
    rotated_hessian = transform_hessian(hessian, input_signs)
    damped = damp_hessian(rotated_hessian, config.damping)
    largest = jnp.finfo(jnp.float32).tiny
    scale = jnp.sqrt((rotated**2).mean()) / config.root_mean_square
    scale = jnp.maximum(scale, largest)
    values = rotated.T

    def round_with(scale: jax.Array, block: jax.Array) -> jax.Array:
        return codebook.decode(codebook.encode(block.T / scale)).T * scale

    rounded = _round_ldlq(values, damped.factor, partial(round_with, scale))

    def refine(
        _: int, state: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        rounded, scale = state
        decoded = _decode(_encode(rounded, scale, codebook), codebook).T
        products = matmul(damped.matrix, decoded)
        # Of all scales of these codes, the one with the least loss.
        best = (products * values).sum() / jnp.maximum(
            (products * decoded).sum(), 1e-30
        )
        best = jnp.where(best > 0, best, scale)
        # Codes stay what they are with the new scale.
        rounded = decoded * best

        def round_block(block: jax.Array, place: jax.Array) -> jax.Array:
            del place
            return round_with(best, block)

        rounded = refine_rounding(values, rounded, damped.matrix, WIDTH, round_block)
        return rounded, best

    rounded, scale = jax.lax.fori_loop(
        0, config.refine_passes, refine, (rounded, scale)
    )
    codes = _encode(rounded, scale, codebook)
    decoded = restore_matrix(
        _decode(codes, codebook) * scale, input_signs, output_signs
    )
    loss = compute_proxy_loss(weight - decoded, hessian)
    return QuipResult(codes, scale, input_signs, output_signs, decoded, loss)


def transform_inputs(inputs: jax.Array, input_signs: jax.Array) -> jax.Array:
    """Returns T_in x of inputs [..., C], which the codes' product takes."""
    return apply_transform(inputs, input_signs)


def restore_outputs(outputs: jax.Array, output_signs: jax.Array) -> jax.Array:
    """Returns T_outᵀ y of what the codes' product gives, [..., R]."""
    return undo_transform(outputs, output_signs)


def transform_matrix(
    weight: jax.Array, input_signs: jax.Array, output_signs: jax.Array
) -> jax.Array:
    """Returns T_out W T_inᵀ of a matrix [R, C]."""
    return apply_transform(apply_transform(weight, input_signs).T, output_signs).T


def restore_matrix(
    rotated: jax.Array, input_signs: jax.Array, output_signs: jax.Array
) -> jax.Array:
    """Returns T_outᵀ W̃ T_in; inverts :func:`transform_matrix`."""
    return undo_transform(undo_transform(rotated, input_signs).T, output_signs).T


def transform_hessian(hessian: jax.Array, input_signs: jax.Array) -> jax.Array:
    """Returns T_in H T_inᵀ of the mean of x xᵀ [C, C]."""
    return apply_transform(apply_transform(hessian, input_signs).T, input_signs)


def _round_ldlq(
    values: jax.Array, factor: jax.Array, round_vectors: partial[jax.Array]
) -> jax.Array:
    """Returns values [C, R] as they were when rounded, eight rows after eight."""
    run = min(RUN, values.shape[0])

    def round_run(
        values: jax.Array, factor: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array, None]:
        del number

        def round_block(block: jax.Array, place: jax.Array) -> jax.Array:
            del place
            return round_vectors(block)

        state = (values, jnp.zeros_like(values))
        starts = jnp.arange(0, run, WIDTH)
        return *round_blocks(state, factor, starts, WIDTH, round_block), None

    rounded, _ = round_in_runs(values, factor, run, round_run)
    return rounded


def _encode(
    rounded: jax.Array, scale: jax.Array, codebook: VectorCodebook
) -> jax.Array:
    """Returns codes [R, C / 8] of values [C, R], a run of columns at a time: a search
    of the codebook takes many times their memory."""
    columns, rows = rounded.shape
    blocks = rounded.reshape(columns // WIDTH, WIDTH, rows)
    codes = jax.lax.map(lambda block: codebook.encode(block.T / scale), blocks)
    return codes.T


def _decode(codes: jax.Array, codebook: VectorCodebook) -> jax.Array:
    """Returns values [R, C] of codes [R, C / 8], without the scale."""
    return codebook.decode(codes).reshape(codes.shape[0], -1)
