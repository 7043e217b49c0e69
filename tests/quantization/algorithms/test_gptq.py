"""GPTQ, against a float64 sweep of the published rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.quantization.algorithms.gptq import GptqConfig, quantize_gptq
from maxlm.quantization.algorithms.hessian import compute_proxy_loss
from maxlm.quantization.algorithms.rounding import fake_quantize
from maxlm.quantization.formats.integer import IntegerFormat

ROWS, COLUMNS, GROUP = 5, 96, 32
FORMAT = IntegerFormat(4, GROUP, scale_dtype="float32")


def draw_layer() -> tuple[np.ndarray, np.ndarray]:
    """A matrix and a Hessian of correlated inputs, of which channel 7 is dead."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((COLUMNS, COLUMNS))
    mixing *= np.exp(-np.arange(COLUMNS) / 20)[:, None]
    inputs = random.standard_normal((300, COLUMNS)) @ mixing
    inputs[:, 7] = 0
    weight = random.standard_normal((ROWS, COLUMNS))
    return weight.astype(np.float32), (inputs.T @ inputs / 300).astype(np.float32)


def round_plainly(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper in float64, a column at a time, with int4's rule."""
    weight = weight.astype(np.float64)
    hessian = hessian.astype(np.float64)
    is_dead = np.diagonal(hessian) == 0
    mean = np.diagonal(hessian)[~is_dead].mean()
    weight[:, is_dead] = 0
    hessian += np.diag(is_dead + 0.01 * mean)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rounded = np.zeros_like(weight)
    scales = np.zeros(ROWS)
    for column in range(COLUMNS):
        if column % GROUP == 0:
            scales = np.abs(weight[:, column : column + GROUP]).max(1) / 7.5
        codes = np.clip(np.round(weight[:, column] / scales), -8, 7)
        rounded[:, column] = codes * scales
        error = (weight[:, column] - rounded[:, column]) / upper[column, column]
        weight[:, column:] -= np.outer(error, upper[column, column:])
    return rounded


@pytest.mark.heavy
def test_gptq_against_float64():
    weight, hessian = draw_layer()
    config = GptqConfig(act_order="none", clip_ratios=(1.0,))
    result = quantize_gptq(jnp.asarray(weight), jnp.asarray(hessian), FORMAT, config)
    reference = round_plainly(weight, hessian)
    np.testing.assert_allclose(result.values, reference, atol=2e-5)
    decoded = FORMAT.decode(result.planes)
    np.testing.assert_allclose(decoded, result.values, atol=1e-6)
    errors = weight - reference
    np.testing.assert_allclose(
        result.loss, np.trace(errors @ hessian @ errors.T), rtol=1e-4
    )


@pytest.mark.more
@pytest.mark.parametrize("act_order", ["none", "static", "groups"])
def test_refinement_lowers_loss(act_order):
    weight, hessian = map(jnp.asarray, draw_layer())
    once = quantize_gptq(weight, hessian, FORMAT, GptqConfig(act_order=act_order))
    config = GptqConfig(act_order=act_order, refine_passes=2)
    refined = quantize_gptq(weight, hessian, FORMAT, config)
    nearest = compute_proxy_loss(weight - fake_quantize(weight, FORMAT), hessian)
    assert once.loss < 0.5 * nearest
    assert refined.loss < once.loss
    np.testing.assert_allclose(FORMAT.decode(refined.planes), refined.values, atol=1e-6)


@pytest.mark.more
def test_hessian_of_few_tokens_is_damped():
    inputs = jax.random.normal(jax.random.key(0), (3, COLUMNS))
    weight = jnp.asarray(draw_layer()[0])
    config = GptqConfig(damping=0.0)
    result = quantize_gptq(weight, inputs.T @ inputs / 3, FORMAT, config)
    assert jnp.isfinite(result.loss)
