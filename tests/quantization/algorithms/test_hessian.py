"""Statistics of inputs, against numpy over all tokens at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.quantization.algorithms.hessian import (
    InputHessian,
    InputMagnitude,
    InputMaximum,
    check_statistic,
)
from tests.errors import message


def test_statistics_in_parts():
    inputs = np.random.default_rng(0).standard_normal((37, 5)).astype(np.float32)
    is_counted = np.arange(37) % 5 != 0
    dirty = np.where(is_counted[:, None], inputs, np.nan)
    statistics = [kind.create(5) for kind in (InputHessian, InputMagnitude)]
    statistics.append(InputMaximum.create(5))
    for part in (slice(0, 10), slice(10, 11), slice(11, 37)):
        rows = jnp.asarray(dirty[part])
        mask = jnp.asarray(is_counted[part])
        statistics = [statistic.update(rows, mask) for statistic in statistics]
    hessian, magnitude, maximum = statistics
    counted = inputs[is_counted]
    expected = counted.T @ counted / len(counted)
    np.testing.assert_allclose(hessian.mean, expected, atol=1e-6)
    np.testing.assert_allclose(magnitude.mean, np.abs(counted).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(maximum.maximum, np.abs(counted).max(0))
    assert [int(statistic.tokens) for statistic in statistics] == [len(counted)] * 3


@pytest.mark.parametrize("kind", [InputHessian, InputMagnitude, InputMaximum])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_inputs_name_the_map(kind, value):
    inputs = np.ones((4, 3), np.float32)
    inputs[2, 1] = value
    statistic = kind.create(3)
    assert "no calibration token" in message(check_statistic, statistic, "up")
    text = message(check_statistic, statistic.update(jnp.asarray(inputs)), "layers/up")
    assert text.startswith("layers/up: inputs are NaN or infinite")
