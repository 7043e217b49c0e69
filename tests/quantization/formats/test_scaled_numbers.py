"""Codes and scales against formulas in float64 and against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from maxlm.quantization.formats.float4 import decode_float4, encode_float4
from maxlm.quantization.formats.floats8 import cast_to_float8
from maxlm.quantization.formats.integer import read_integer_format
from maxlm.quantization.formats.power_scales import (
    compute_scale_exponents,
    decode_exponents,
    round_up_to_power,
)
from maxlm.quantization.formats.registry import parse_format


def draw_values(rows, columns):
    """Rows of different sizes, so that a scale of another row shows."""
    generator = np.random.default_rng(rows * columns)
    sizes = np.exp(2 * generator.normal(size=(rows, 1)))
    values = generator.normal(size=(rows, columns)) * sizes
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "block"),
    [
        ("int8-f32", 7, 45, (1, 45)),
        ("int4-g32", 5, 96, (1, 32)),
        ("int5-g16-f16", 3, 64, (1, 16)),
        ("int8-b128-f32", 150, 200, (128, 128)),
    ],
)
def test_symmetric_integers(name, rows, columns, block):
    weight_format = read_integer_format(name)
    values = draw_values(rows, columns)
    planes = jax.jit(weight_format.encode)(values)
    dtype = jnp.dtype(weight_format.scale_dtype)
    smallest, largest = weight_format.code_range
    codes = np.asarray(jax.jit(weight_format.unpack)(planes))
    for row in range(0, rows, block[0]):
        for column in range(0, columns, block[1]):
            part = slice(row, row + block[0]), slice(column, column + block[1])
            numbers = values[part]
            largest_number = np.abs(numbers).max().astype(np.float64)
            scale = (largest_number / (largest + 0.5)).astype(np.float32).astype(dtype)
            place = row // block[0], column // block[1]
            assert planes["scales"][place] == scale
            # The largest is half a step beyond a code, but for its rounding in fp32.
            expected = np.round(numbers / np.float32(scale)).clip(smallest, largest)
            np.testing.assert_array_equal(codes[part], expected)
    decoded = np.asarray(jax.jit(weight_format.decode)(planes))
    # Half a step, and what the largest code cuts off.
    steps = np.abs(values).max() / largest
    assert np.abs(decoded - values).max() < 0.6 * steps


def test_asymmetric_integers():
    weight_format = read_integer_format("int4-g32-asym-f32")
    # All above zero, all below, and both.
    values = draw_values(4, 96) + np.repeat([3, -3, 0, 0], 24).reshape(1, 96)
    values = values.astype(np.float32)
    planes = jax.jit(weight_format.encode)(values)
    blocks = values.reshape(4, 3, 32)
    low = blocks.min(-1).clip(max=0)
    high = blocks.max(-1).clip(min=0)
    scales = (high - low) / np.float32(15)
    zeros = np.round(-8 - low / scales)
    np.testing.assert_array_equal(planes["scales"], scales)
    np.testing.assert_array_equal(planes["zeros"], zeros)
    codes = np.round(blocks / scales[..., None] + zeros[..., None]).clip(-8, 7)
    here = jax.jit(weight_format.unpack)(planes)
    np.testing.assert_array_equal(here, codes.reshape(values.shape))
    decoded = (codes - zeros[..., None]) * scales[..., None]
    there = decoded.reshape(values.shape)
    here = jax.jit(weight_format.decode)(planes)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_fp8_blocks_at_edges():
    weight_format = parse_format("fp8-b128")
    values = draw_values(130, 300)
    planes = jax.jit(weight_format.encode)(values)
    assert planes["scales"].shape == (2, 3)
    corner = values[128:, 256:]
    scale = (np.abs(corner.astype(np.float64)).max() / 448).astype(np.float32)
    assert planes["scales"][1, 2] == scale
    codes = (corner / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(planes["codes"][128:, 256:], codes)
    decoded = jax.jit(weight_format.decode)(planes)
    np.testing.assert_array_equal(decoded[128:, 256:], codes.astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)],
)
def test_fp8_of_all_bf16(kind, dtype):
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    values = values.astype(np.float32)
    is_number = ~np.isnan(values)
    largest = float(ml_dtypes.finfo(dtype).max)
    there = values[is_number].clip(-largest, largest).astype(dtype)
    here = np.asarray(jax.jit(cast_to_float8, static_argnums=1)(values, kind))
    codes = here.view(np.uint8)[is_number]
    np.testing.assert_array_equal(codes, there.view(np.uint8))
    assert np.isnan(here.astype(np.float32)[~is_number]).all()


def test_fp4():
    # Sixteenths: every code, every tie, and beyond the largest.
    values = np.arange(-160, 161, dtype=np.float32) / 16
    there = values.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = jax.jit(encode_float4)(values)
    here = np.asarray(jax.jit(decode_float4)(codes))
    np.testing.assert_array_equal(here, there.astype(np.float32))
    all_codes = np.arange(16, dtype=np.uint8)
    there = all_codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(decode_float4)(all_codes), there)


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_power_scales(rule):
    generator = np.random.default_rng(0)
    maxima = np.exp2(generator.uniform(-90, 90, 500)).astype(np.float32)
    # At and beside powers of two, M times them, and halves between codes.
    powers = np.exp2(np.arange(-20, 20)).astype(np.float32)
    edges = np.concatenate([powers, 6 * powers, 5 * powers, 7 * powers])
    maxima = np.concatenate(
        [maxima, edges, np.nextafter(edges, 0), np.nextafter(edges, np.float32(9e9))]
    ).astype(np.float32)
    exponents = jax.jit(compute_scale_exponents, static_argnums=(1, 2, 3, 4))(
        maxima, rule, 6.0, 2, 1
    )
    wide = maxima.astype(np.longdouble)
    if rule == "floor":
        expected = np.floor(np.log2(wide)) - 2
    elif rule == "ceil":
        expected = np.ceil(np.log2(wide)) - 2
    elif rule == "even":
        # Rounded to 1 and 1.5 times powers of two, half up.
        unit = np.exp2(np.floor(np.log2(wide)))
        expected = np.log2(unit) - 2 + (wide / unit >= 1.75)
    else:
        # The quotient is rounded to fp32 before it is rounded up.
        expected = np.ceil(np.log2((maxima / np.float32(6)).astype(np.longdouble)))
    np.testing.assert_array_equal(exponents, expected + 127)
    np.testing.assert_array_equal(
        decode_exponents(exponents), np.exp2(expected).astype(np.float32)
    )


def test_round_up_to_power():
    scales = np.array([0.25, 0.2500001, 3, 4, 1e-20], np.float32)
    here = jax.jit(round_up_to_power)(scales)
    np.testing.assert_array_equal(here, np.exp2(np.ceil(np.log2(scales))))


def test_nvfp4():
    weight_format = parse_format("nvfp4")
    values = draw_values(3, 64)
    # Its scale would be less than the smallest.
    values[0, 16:32] *= 1e-5
    planes = jax.jit(weight_format.encode)(values)
    matrix_scale = np.float32(np.float64(np.abs(values).max()) / (448 * 6))
    assert planes["matrix_scale"] == matrix_scale
    maxima = np.abs(values.reshape(3, 4, 16)).max(-1)
    scales = (maxima / np.float32(6) / matrix_scale).clip(2**-6, 448)
    scales = scales.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(planes["scales"], scales)
    spread = np.repeat(scales.astype(np.float32) * matrix_scale, 16, 1)
    numbers = (values / spread).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    there = numbers.astype(np.float32) * spread
    here = jax.jit(weight_format.decode)(planes)
    np.testing.assert_allclose(here, there, rtol=1e-6)
