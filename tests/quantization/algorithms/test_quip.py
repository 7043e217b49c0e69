"""QuIP# with E8P: rounding in turn against rounding to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.quantization.algorithms.hessian import compute_proxy_loss
from maxlm.quantization.algorithms.quip import (
    E8pCodebook,
    QuipConfig,
    quantize_quip,
    restore_outputs,
    transform_inputs,
)
from maxlm.quantization.formats.e8p import E8pFormat, decode_vectors
from tests.errors import message


@pytest.mark.heavy
def test_quip_beats_plain_rounding():
    random = np.random.default_rng(0)
    mixing = random.standard_normal((96, 96)) * np.exp(-np.arange(96) / 20)[:, None]
    inputs = jnp.asarray(random.standard_normal((300, 96)) @ mixing, jnp.float32)
    weight = jnp.asarray(random.standard_normal((12, 96)), jnp.float32)
    hessian = inputs.T @ inputs / 300
    result = quantize_quip(
        weight, hessian, E8pCodebook(), 5, QuipConfig(refine_passes=1)
    )
    plain = E8pFormat().decode(E8pFormat().encode(weight))
    assert result.loss < 0.5 * compute_proxy_loss(weight - plain, hessian)
    # The product in the rotated space is the product with the matrix.
    rotated = decode_vectors(result.codes).reshape(12, 96) * result.scale
    outputs = transform_inputs(inputs, result.input_signs) @ rotated.T
    outputs = restore_outputs(outputs, result.output_signs)
    expected = inputs @ result.values.T
    np.testing.assert_allclose(outputs, expected, atol=1e-4 * jnp.abs(expected).max())


def test_columns_not_of_eight():
    arguments = (jnp.zeros((2, 12)), jnp.eye(12), E8pCodebook(), 0)
    assert "not divisible by 8" in message(quantize_quip, *arguments)
