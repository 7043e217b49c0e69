"""Randomised Hadamard transforms of many sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.quantization.algorithms.hadamard import (
    apply_transform,
    describe_transform,
    draw_signs,
    plan_hadamard,
    undo_transform,
)


@pytest.mark.parametrize("size", [192, 576, 344, 52, 15, 1])
def test_transform_is_orthogonal(size):
    signs = draw_signs(3, size)
    matrix = np.asarray(apply_transform(jnp.eye(size), signs), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    identity = undo_transform(jnp.asarray(matrix, jnp.float32), signs)
    np.testing.assert_allclose(identity, np.eye(size), atol=1e-5)
    if plan_hadamard(size).core_kind == "hadamard":
        np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-4)


def test_transforms_in_words():
    assert describe_transform(1536) == "12 (Paley) x 128"
    assert describe_transform(11008) == "344 (Paley) x 32"
    assert describe_transform(15) == "15 (cosines)"
    assert abs(float(draw_signs(0, 1536).mean())) < 0.1
    assert not np.array_equal(draw_signs(0, 64), draw_signs(1, 64))
