"""Products with rounded inputs are those of the codes, summed in whole numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.parallel.operands import MapAxes
from maxlm.quantization.activations import round_tokens
from maxlm.quantization.formats.floats8 import Float8Format
from maxlm.quantization.formats.integer import IntegerFormat
from maxlm.quantization.product import QuantizedProduct

WHOLE = MapAxes((), (), ())


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """fp32 numbers, each token's of another size."""
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.integers(-3, 3, (*shape[:-1], 1))
    return (random.standard_normal(shape) * sizes).astype(np.float32)


def test_int8_products_sum_codes_exactly():
    x = draw(2, 5, 37)
    weight = draw(11, 37, seed=1)
    number_format = IntegerFormat(8, scale_dtype="float32")
    planes = number_format.encode(jnp.asarray(weight))
    product = QuantizedProduct(number_format, rows_first=True, activations="int8")
    y = jax.jit(lambda x: product.multiply(x, planes, WHOLE))(x)

    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.clip(np.round(x / scales), -127, 127).astype(np.int64)
    sums = codes @ np.asarray(planes["codes"], np.int64).T
    expected = sums * scales.astype(np.float64)
    expected *= np.asarray(planes["scales"], np.float64)[:, 0]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    # Rounding is all that it differs by from the product with the weights.
    plain = x.astype(np.float64) @ weight.T
    norms = np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(weight, axis=-1)
    errors = np.abs(y - plain) / norms
    assert 1e-5 < errors.max() < 0.01


def test_fp8_products_multiply_codes():
    x = draw(2, 5, 37)
    weight = draw(11, 37, seed=1)
    planes = Float8Format().encode(jnp.asarray(weight))
    product = QuantizedProduct(Float8Format(), rows_first=True, activations="fp8")
    y = jax.jit(lambda x: product.multiply(x, planes, WHOLE))(x)

    scales = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    codes = np.clip(x / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    sums = codes.astype(np.float64) @ np.asarray(planes["codes"], np.float64).T
    expected = sums * scales * np.asarray(planes["scales"], np.float64)[:, 0]
    tolerance = 1e-6 * np.abs(expected).max(-1, keepdims=True)
    assert np.all(np.abs(y - expected) <= tolerance)


@pytest.mark.heavy
def test_a_token_has_one_scale_on_all_devices_of_its_inputs(mesh):
    x = draw(3, 8)
    with jax.set_mesh(mesh(tensor=2)):
        split = jax.shard_map(
            lambda x: tuple(round_tokens(x, "int8", ("tensor",))),
            in_specs=P(None, "tensor"),
            out_specs=(P(None, "tensor"), P()),
            check_vma=False,
        )
        codes, scales = jax.jit(split)(jax.device_put(x, P(None, "tensor")))
    whole = round_tokens(jnp.asarray(x), "int8")
    np.testing.assert_array_equal(codes, whole.codes)
    np.testing.assert_array_equal(scales, whole.scales)
