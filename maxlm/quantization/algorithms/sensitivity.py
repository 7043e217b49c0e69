"""How much each matrix suffers from each format.

Two measures: the error of the matrix's own outputs, which its Hessian gives without
running the model; and the rise of the model's loss with one matrix rounded, which needs
a run for each. Runs with one format for each matrix scale the cheap measure for the
others.
"""

from collections.abc import Callable, Mapping

import jax

from maxlm.quantization.algorithms.hessian import compute_proxy_loss

RoundMatrix = Callable[[jax.Array], jax.Array]
"""Of a matrix [R, C], what a format makes of it."""


def measure_output_errors(
    weight: jax.Array, hessian: jax.Array, formats: Mapping[str, RoundMatrix]
) -> dict[str, float]:
    """Returns tr(ΔW H ΔWᵀ) of a matrix [R, C] for each format.

    Args:
        hessian: the mean of x xᵀ of the matrix's inputs, [C, C].
        formats: by name, what rounds the matrix.
    """
    return {
        name: float(compute_proxy_loss(weight - round_matrix(weight), hessian))
        for name, round_matrix in formats.items()
    }


def measure_loss_rises(
    matrices: list[str], measure_loss: Callable[[str | None], float]
) -> dict[str, float]:
    """Returns by matrix how much the model's loss rises with that matrix alone rounded.

    Args:
        measure_loss: the model's mean loss on calibration text, with the named matrix
            rounded; None: with none rounded.
    """
    plain = measure_loss(None)
    return {name: measure_loss(name) - plain for name in matrices}


def scale_output_errors(
    output_errors: Mapping[str, Mapping[str, float]],
    loss_rises: Mapping[str, float],
    measured_format: str,
) -> dict[str, dict[str, float]]:
    """Returns by matrix and format the rise of the model's loss: measured for one
    format, and in proportion to the error of the matrix's outputs for all others.

    Args:
        output_errors: by matrix and format, :func:`measure_output_errors`.
        loss_rises: by matrix, :func:`measure_loss_rises` with ``measured_format``.
            Rises below zero, which are noise, count as zero.
    """
    rises = {}
    for matrix, errors in output_errors.items():
        measured_error = errors[measured_format]
        rise = max(loss_rises[matrix], 0.0)
        ratio = rise / measured_error if measured_error > 0 else 0.0
        rises[matrix] = {name: ratio * error for name, error in errors.items()}
    return rises
