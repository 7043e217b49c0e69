"""What all number formats promise: names, arrays, error on normal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config.errors import MaxlmError
from maxlm.quantization.formats.registry import parse_format

NRMSE = {
    # Issue 61: published, or measured with another library.
    "nf4": 0.0919,
    "nf4-double": 0.0919,
    "mxfp8": 0.0293,
    "mxfp8-rceil": 0.0265,
    "mxfp8-even": 0.0276,
    "mxfp4": 0.1150,
    "mxfp4-rceil": 0.1155,
    "mxfp4-even": 0.1119,
    "mxfp4-ceil": 0.1443,
    "nvfp4": 0.0951,
    "e8p": 0.3028,
    # Measured here.
    "int8": 0.0070,
    "int4-g32": 0.0947,
    "int4-g32-asym": 0.0807,
    "int3-g48": 0.214,
    "int7": 0.0132,
    "int8-b64x32-f32": 0.0084,
    "fp8": 0.0264,
    "fp8-tensor": 0.0265,
    "fp8-b128-ue8m0": 0.0265,
    "fp8e5m2-g32": 0.0526,
    "nf4-g32-double": 0.0869,
    "mxfp8e5m2-ceil": 0.0526,
    "nvfp4-one": 0.0951,
}
"""Errors on N(0, 1)."""


MOST_DIFFERENT = ["int4-g32-asym", "int3-g48", "int8-b64x32-f32", "fp8", "nf4-double"]
MOST_DIFFERENT += ["mxfp8", "mxfp4-even", "nvfp4", "e8p"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in MOST_DIFFERENT else pytest.param(name, marks=pytest.mark.more)
        for name in NRMSE
    ],
)
def test_planes(name):
    weight_format = parse_format(name)
    assert weight_format.name == name
    assert parse_format(weight_format.name) == weight_format
    rows, columns = 300, 192
    values = np.random.default_rng(0).normal(size=(2, rows, columns))
    # A matrix of zeros has no scale to divide by.
    values[1] = 0
    specs = weight_format.describe_planes(rows, columns)

    @jax.jit
    def encode_and_decode(x):
        planes = weight_format.encode(x)
        return planes, weight_format.decode(planes, jnp.bfloat16)

    planes, decoded = encode_and_decode(values.astype(np.float32))
    shapes = {plane: (array.shape, array.dtype) for plane, array in planes.items()}
    assert shapes == {
        plane: ((2, spec.rows, spec.columns), jnp.dtype(spec.dtype))
        for plane, spec in specs.items()
    }
    num_bytes = sum(array.nbytes for array in planes.values())
    assert weight_format.count_bytes(values.shape) == num_bytes
    assert decoded.shape == values.shape
    assert decoded.dtype == jnp.bfloat16
    assert not np.asarray(decoded[1]).any()
    error = np.sqrt(np.square(decoded[0] - values[0]).mean())
    assert error < NRMSE[name] * 1.05


@pytest.mark.more
@pytest.mark.parametrize("name", list(NRMSE)[:11])
def test_error_on_normal_numbers(name):
    weight_format = parse_format(name)
    values = np.random.default_rng(1).normal(size=(512, 512)).astype(np.float32)
    decoded = jax.jit(lambda x: weight_format.decode(weight_format.encode(x)))(values)
    error = np.sqrt(np.square(decoded - values).mean() / np.square(values).mean())
    assert abs(error / NRMSE[name] - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int4-g32", 4.5), ("nf4-double", 4.126953125), ("mxfp4", 4.25), ("nvfp4", 4.5)],
)
def test_bits_a_number(name, bits):
    assert parse_format(name).count_bits((8, 1024, 4096)) == pytest.approx(bits, 1e-4)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("int9", "int8"),
        ("int4-g32-asymm", "int4-g32-asym"),
        ("int4-g0", "int4-g32"),
        ("fp8-b128x", "fp8-b128"),
        ("fp8-g128-b128", "fp8-g128"),
        ("nf4-dubble", "nf4-double"),
        ("mxfp4-evne", "mxfp4-even"),
        ("nvfp4-two", "nvfp4-one"),
        ("e8p-x", "e8p"),
    ],
)
def test_name_of_no_format(name, near):
    with pytest.raises(MaxlmError, match=f"format={name}; did you mean {near}"):
        parse_format(name)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("int4-g128", 128),
        ("int3", 32),
        ("int8-g24", 24),
        ("fp8-g128", 128),
        ("nf4", 64),
        ("mxfp8", 32),
        ("nvfp4", 32),
        ("e8p", 8),
    ],
)
def test_no_whole_number_of_blocks(name, block):
    message = rf"\[5, 100\] is no whole number of {name}'s blocks of {block} columns"
    with pytest.raises(MaxlmError, match=message):
        parse_format(name).encode(jnp.zeros((5, 100)))
