"""Codes of number formats, equal to other libraries', and what they decode to."""

import jax
import numpy as np
import pytest

for package in ("torch", "bitsandbytes", "compressed_tensors", "torchao"):
    pytest.importorskip(package)

import torch  # noqa: E402
from bitsandbytes import functional  # noqa: E402

from benchmarks.quantization_formats import NAMES, ORACLES, ask_oracle  # noqa: E402
from benchmarks.quantization_oracles import read_codes  # noqa: E402
from maxlm.quantization.formats.flat_normal_float import (  # noqa: E402
    FlatNested,
    FlatNormalFloat,
    decode_flat_normal_float,
    encode_flat_normal_float,
)
from maxlm.quantization.formats.normal_float import compute_dynamic_map  # noqa: E402
from maxlm.quantization.formats.registry import parse_format  # noqa: E402

FORMAT_NAMES = [
    *(name for kind, names in NAMES.items() if kind in ORACLES for name in names),
    "int4-g32-f16",
    "int8-f32",
    "int3-g64-asym-f32",
    "fp8e5m2-g32-ue8m0",
    "nf4-g32",
    "mxfp8e5m2-rceil",
    "e8p",
]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_codes(name):
    weight_format = parse_format(name)
    generator = np.random.default_rng(0)
    # Blocks of 128 x 128 are whole: torchao has no others.
    rows, columns = (128, 384) if name == "e8p" else (640, 768)
    values = generator.normal(size=(rows, columns))
    if name != "e8p":
        # Rows of very different sizes, one of zeros, and blocks of zeros. Under the one
        # scale of E8P many points are as near to these as each other.
        values *= np.exp(3 * generator.normal(size=(rows, 1)))
        values[3] = 0
        values[5, :128] = 0
    values = values.astype(np.float32)
    there = ask_oracle(weight_format, values)
    assert there is not None
    planes = jax.jit(weight_format.encode)(values)
    codes = read_codes(planes)
    is_equal = codes == there.codes
    assert is_equal.mean() >= 0.99999
    if there.values is not None:
        decoded = np.asarray(jax.jit(weight_format.decode)(planes))
        is_compared = np.repeat(is_equal, columns // codes.shape[1], 1)
        scale = np.abs(values).max(1, keepdims=True)
        differences = np.abs(decoded - there.values) / np.where(scale == 0, 1, scale)
        assert differences[is_compared].max() <= 1e-6


def test_flat_normal_float():
    size = 64 * 1000 + 33
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    packed, state = functional.quantize_4bit(torch.tensor(values), quant_type="nf4")
    here = encode_flat_normal_float(values, double=False)
    np.testing.assert_array_equal(here.codes, packed.numpy()[:, 0])
    np.testing.assert_array_equal(here.maxima, state.absmax.numpy())
    decoded = functional.dequantize_4bit(packed, state).numpy().reshape(-1)
    np.testing.assert_array_equal(decode_flat_normal_float(here, size), decoded)


@pytest.mark.parametrize("size", [64 * 256 * 3, 64 * 1000 + 33])
def test_flat_double_quantization(size):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    packed, state = functional.quantize_4bit(
        torch.tensor(values), compress_statistics=True, quant_type="nf4"
    )
    nested_state = state.state2
    assert nested_state is not None
    assert state.offset is not None
    offset = state.offset.numpy()
    dynamic_map = nested_state.code.numpy()
    nested = FlatNested(nested_state.absmax.numpy(), offset, dynamic_map)
    read = FlatNormalFloat(packed.numpy()[:, 0], state.absmax.numpy(), nested)
    decoded = functional.dequantize_4bit(packed, state).numpy().reshape(-1)
    np.testing.assert_array_equal(decode_flat_normal_float(read, size), decoded)

    here = encode_flat_normal_float(values, dynamic_map=dynamic_map)
    np.testing.assert_array_equal(here.codes, read.codes)
    assert here.nested is not None
    np.testing.assert_allclose(here.nested.offset, offset, rtol=1e-6)
    np.testing.assert_allclose(here.nested.scales, nested.scales, rtol=1e-5)
    # Its portable kernel: that of CPUs looks codes up in a table of 2^16.
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    portable = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    maxima = np.abs(np.pad(values, (0, -size % 64)).reshape(-1, 64)).max(-1)
    centred = torch.tensor(maxima - here.nested.offset)
    codes, _ = kernel.redispatch(portable, centred, nested_state.code, 256)
    np.testing.assert_array_equal(here.maxima, codes.numpy())
    assert (here.maxima != read.maxima).mean() < 0.005


def test_dynamic_map():
    there = functional.create_dynamic_map().numpy()
    np.testing.assert_allclose(compute_dynamic_map(), there, rtol=2e-7)
