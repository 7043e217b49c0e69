"""NF4 against its definition, in the order of matrices and in bitsandbytes' flat one."""

import jax
import numpy as np
import pytest

from maxlm.quantization.formats.code_planes import join_codes
from maxlm.quantization.formats.flat_normal_float import (
    decode_flat_maxima,
    decode_flat_normal_float,
    encode_flat_normal_float,
)
from maxlm.quantization.formats.normal_float import (
    NF4_CODES,
    NormalFloatFormat,
    compute_dynamic_map,
)


def find_nearest(values, numbers):
    """Indices of the nearest of some numbers."""
    return np.abs(values[..., None] - np.asarray(numbers, np.float64)).argmin(-1)


def test_codes():
    weight_format = NormalFloatFormat()
    values = np.random.default_rng(0).normal(size=(9, 192)).astype(np.float32)
    planes = jax.jit(weight_format.encode)(values)
    blocks = values.reshape(9, 3, 64).astype(np.float64)
    maxima = np.abs(blocks).max(-1)
    codes = find_nearest(blocks / maxima[..., None], NF4_CODES)
    here = jax.jit(join_codes, static_argnums=1)(planes, 4)
    np.testing.assert_array_equal(here, codes.reshape(9, 192))
    np.testing.assert_array_equal(planes["scales"], maxima)
    there = np.asarray(NF4_CODES)[codes] * maxima[..., None]
    here = jax.jit(weight_format.decode)(planes)
    np.testing.assert_allclose(here, there.reshape(9, 192), rtol=1e-6)


def test_double_quantization():
    weight_format = NormalFloatFormat(double=True)
    values = np.random.default_rng(0).normal(size=(2, 300, 128)).astype(np.float32)
    planes = jax.jit(weight_format.encode)(values)
    maxima = np.abs(values.reshape(2, 300, 2, 64).astype(np.float64)).max(-1)
    offset = maxima.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(planes["scale_offset"], offset, rtol=1e-6)
    centred = maxima - np.asarray(planes["scale_offset"])
    # 256 rows of a block column, and the 44 that are left.
    parts = [centred[:, :256], centred[:, 256:]]
    nested = np.stack([np.abs(part).max(1) for part in parts], 1)
    np.testing.assert_allclose(planes["nested_scales"], nested, rtol=1e-6)
    spread = np.repeat(np.asarray(planes["nested_scales"]), 256, 1)[:, :300]
    dynamic_map = compute_dynamic_map()
    codes = find_nearest(centred / spread, dynamic_map)
    np.testing.assert_array_equal(planes["scales"], codes)
    scales = jax.jit(weight_format.decode_scales)(planes)
    there = dynamic_map[codes] * spread + np.asarray(planes["scale_offset"])
    np.testing.assert_allclose(scales, there, rtol=1e-6)


def test_dynamic_map():
    dynamic_map = compute_dynamic_map()
    assert dynamic_map.shape == (256,)
    assert (np.diff(dynamic_map) > 0).all()
    # The finest step is that of two decades' 64 fractions, the largest number 1.
    assert dynamic_map[-2:] == pytest.approx([0.9929688, 1])
    assert dynamic_map[0] == pytest.approx(-0.9929688)
    assert dynamic_map[127] == 0


@pytest.mark.parametrize("size", [64 * 300, 64 * 3 + 33])
def test_flat_order(size):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    array = encode_flat_normal_float(values)
    assert array.codes.shape == (-(-size // 2),)
    num_blocks = -(-size // 64)
    assert array.maxima.shape == (num_blocks,)
    assert array.maxima.dtype == np.uint8
    assert array.nested is not None
    assert array.nested.scales.shape == (-(-num_blocks // 256),)
    # The codes are those of the matrix's order, the first of a pair in the high half.
    matrix = np.pad(values, (0, -size % 64))[None]
    planes = jax.jit(NormalFloatFormat().encode)(matrix)
    halves = np.stack([array.codes >> 4, array.codes & 15], -1).reshape(-1)[:size]
    codes = jax.jit(join_codes, static_argnums=1)(planes, 4)
    np.testing.assert_array_equal(halves, codes[0, :size])
    maxima = np.abs(matrix.reshape(-1, 64)).max(-1)
    decoded_maxima = decode_flat_maxima(array)
    # The dynamic map's largest step is 1.4% of the largest difference from the mean.
    largest = np.abs(maxima - maxima.mean()).max()
    assert np.abs(decoded_maxima - maxima).max() < 0.0071 * largest
    there = np.asarray(NF4_CODES)[halves] * np.repeat(decoded_maxima, 64)[:size]
    here = decode_flat_normal_float(array, size)
    np.testing.assert_allclose(here, there, rtol=1e-6)
