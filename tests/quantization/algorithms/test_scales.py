"""Scales of input channels: AWQ's and SmoothQuant's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.quantization.algorithms.awq import (
    clip_groups,
    search_channel_scales,
    search_clip,
)
from maxlm.quantization.algorithms.gptq import quantize_gptq
from maxlm.quantization.algorithms.hessian import compute_proxy_loss, rescale_hessian
from maxlm.quantization.algorithms.rounding import fake_quantize
from maxlm.quantization.algorithms.smoothquant import compute_smoothing_scales
from maxlm.quantization.formats.integer import IntegerFormat

FORMAT = IntegerFormat(3, 32, scale_dtype="float32")


def draw_salient() -> tuple[jax.Array, jax.Array]:
    """A matrix, and inputs of which a few channels are thirty times the others."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((200, 64)).astype(np.float32)
    inputs[:, [3, 17, 40]] *= 30
    weight = random.standard_normal((24, 64)).astype(np.float32)
    return jnp.asarray(weight), jnp.asarray(inputs)


@pytest.mark.heavy
def test_awq_saves_salient_channels():
    weight, inputs = draw_salient()
    hessian = inputs.T @ inputs / len(inputs)
    magnitude = jnp.abs(inputs).mean(0)
    best = search_channel_scales([weight, 2 * weight], hessian, magnitude, FORMAT)
    assert best.loss < 0.6 * best.plain_loss
    # The same from the outputs themselves.
    scaled = fake_quantize(weight * best.scales, FORMAT)
    outputs = (inputs / best.scales) @ scaled.T - inputs @ weight.T
    expected = 5 * jnp.square(outputs).sum(1).mean()
    np.testing.assert_allclose(best.loss, expected, rtol=1e-3)
    # Scale, then GPTQ with the Hessian of scaled inputs.
    scaled_hessian = rescale_hessian(hessian, best.scales)
    both = quantize_gptq(weight * best.scales, scaled_hessian, FORMAT)
    assert both.loss < compute_proxy_loss(scaled - weight * best.scales, scaled_hessian)


@pytest.mark.more
def test_clip_search_lowers_error():
    weight, inputs = draw_salient()
    weight = weight.at[:, 5].mul(6)
    hessian = inputs.T @ inputs / len(inputs)
    limits = search_clip(weight, hessian, FORMAT)
    clipped = fake_quantize(clip_groups(weight, limits), FORMAT)
    plain = compute_proxy_loss(weight - fake_quantize(weight, FORMAT), hessian)
    assert compute_proxy_loss(weight - clipped, hessian) < 0.9 * plain
    assert limits.shape == (24, 2)


@pytest.mark.heavy
def test_smoothquant_of_planted_outliers():
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.standard_normal((64, 256)), jnp.float32)
    inputs = inputs.at[:, [3, 170]].mul(100)
    weight = jnp.asarray(random.standard_normal((24, 256)), jnp.float32)
    scales = compute_smoothing_scales([weight], jnp.abs(inputs).max(0))
    products = [
        (inputs, weight),
        (inputs / scales, weight * scales),
    ]
    # W8A8: a scale for each token and each output.
    byte = IntegerFormat(8, scale_dtype="float32")
    errors = []
    for x, w in products:
        rounded = fake_quantize(x, byte) @ fake_quantize(w, byte).T
        errors.append(float(jnp.square(rounded - inputs @ weight.T).mean()))
    assert errors[1] < errors[0] / 5
    dead = compute_smoothing_scales([weight], jnp.zeros(256))
    np.testing.assert_array_equal(dead, 1)
