"""Codes of number formats by other libraries, for :mod:`benchmarks.quantization_formats`
and the tests of parity.

An oracle takes a format and fp32 values [R, C]. It imports its library when called and
returns None for settings that the library does not have.
"""

import ctypes
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock, patch

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from maxlm.quantization.formats.code_planes import join_codes
from maxlm.quantization.formats.e8p import E8pFormat, decode_vectors
from maxlm.quantization.formats.floats8 import Float8Format
from maxlm.quantization.formats.format import Format, Planes
from maxlm.quantization.formats.integer import IntegerFormat
from maxlm.quantization.formats.microscaling import MicroscalingFormat
from maxlm.quantization.formats.normal_float import NormalFloatFormat
from maxlm.quantization.formats.nvfp4 import Nvfp4Format

ML_DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@dataclass(frozen=True)
class OracleCodes:
    """What a library makes of values.

    Args:
        library: its name.
        codes: integers [R, C / numbers a code].
        values: fp32 [R, C] that it decodes them to; None: it decodes other scales.
    """

    library: str
    codes: np.ndarray
    values: np.ndarray | None


def read_codes(planes: Planes) -> np.ndarray:
    """Returns the codes of a matrix's planes as integers [R, C / numbers a code]."""
    if "codes" in planes:
        codes = np.asarray(planes["codes"])
        if codes.dtype.itemsize == 1:
            return codes.view(np.uint8)
        return codes
    widths = [int(name[5:]) for name in planes if name.startswith("codes")]
    return np.asarray(join_codes(planes, sum(widths)))


def encode_by_compressed_tensors(
    format: Format, values: np.ndarray
) -> OracleCodes | None:
    """Integers and FP8 E4M3 by rows and matrices, by compressed-tensors."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationType
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = torch.tensor(values)
    rows = values.shape[0]
    assert isinstance(format, IntegerFormat | Float8Format)
    block_rows, block_columns = format.scale_block
    settings = {}
    if isinstance(format, IntegerFormat):
        settings["symmetric"] = format.symmetric
        settings["num_bits"] = format.bits
        if format.scale_dtype != "float32":
            settings["scale_dtype"] = getattr(torch, format.scale_dtype)
    else:
        settings["type"] = QuantizationType.FLOAT
    if block_rows is None:
        settings["strategy"] = "tensor"
        blocks = x.reshape(1, 1, -1)
    elif block_rows > 1:
        settings |= {"strategy": "block"}
        settings["block_structure"] = [block_rows, block_columns]
        blocks = x.reshape(rows // block_rows, block_rows, -1, block_columns or 1)
        blocks = blocks.transpose(1, 2).flatten(2)
    elif block_columns is None:
        settings["strategy"] = "channel"
        blocks = x[:, None]
    else:
        settings |= {"strategy": "group", "group_size": block_columns}
        blocks = x.reshape(rows, -1, block_columns)
    args = QuantizationArgs(**settings)
    scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    codes = quantize(x, scales, zeros, args)
    decoded = dequantize(codes, scales, zeros, args, dtype=torch.float32).numpy()
    if isinstance(format, Float8Format):
        numbers = codes.numpy().astype(ml_dtypes.float8_e4m3fn)
        return OracleCodes("compressed-tensors", numbers.view(np.uint8), decoded)
    integers = codes.numpy().astype(np.int32)
    if format.bits == 8:
        unsigned = integers.astype(np.int8).view(np.uint8)
    else:
        unsigned = (integers - format.code_range[0]).astype(np.uint8)
    return OracleCodes("compressed-tensors", unsigned, decoded)


def encode_float8(format: Format, values: np.ndarray) -> OracleCodes | None:
    """FP8 by compressed-tensors, by torchao's references of blocks of 128, or by
    ml_dtypes."""
    assert isinstance(format, Float8Format)
    rows, columns = values.shape
    is_e4m3 = format.kind == "e4m3" and not format.power_of_two
    if is_e4m3 and format.block[1] is None:
        return encode_by_compressed_tensors(format, values)
    if is_e4m3 and format.block in [(1, 128), (128, 128)]:
        import torch

        kernels = _import_torchao_blockwise()
        if format.block == (1, 128):
            quantize = kernels.torch_blockwise_scale_act_quant_lhs
        else:
            quantize = kernels.torch_blockwise_scale_weight_quant
        codes, scales = quantize(torch.tensor(values), 128)
        numbers = codes.float().numpy().astype(ml_dtypes.float8_e4m3fn)
        block_rows = format.block[0] or rows
        spread = np.repeat(scales.numpy(), 128, 1)
        spread = np.repeat(spread, block_rows, 0)
        decoded = numbers.astype(np.float32) * spread
        return OracleCodes("torchao", numbers.view(np.uint8), decoded)
    dtype = ML_DTYPES[format.kind]
    largest = float(ml_dtypes.finfo(dtype).max)
    block_rows = format.block[0] or rows
    block_columns = format.block[1] or columns
    edges = [(0, -rows % block_rows), (0, -columns % block_columns)]
    padded = np.pad(values, edges)
    shape = (padded.shape[0] // block_rows, block_rows, -1, block_columns)
    maxima = np.abs(padded.reshape(shape)).max((1, 3))
    scales = maxima / np.float32(largest)
    if format.power_of_two:
        mantissas, exponents = np.frexp(scales)
        # frexp's mantissas are at least a half, and a half only of a power of two.
        scales = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
    spread = np.repeat(np.repeat(scales, block_rows, 0), block_columns, 1)
    spread = spread[:rows, :columns]
    divisors = np.where(spread == 0, 1, spread)
    codes = np.clip(values / divisors, -largest, largest).astype(dtype)
    decoded = codes.astype(np.float32) * spread
    return OracleCodes("ml_dtypes", codes.view(np.uint8), decoded)


def encode_by_bitsandbytes(format: Format, values: np.ndarray) -> OracleCodes | None:
    """NF4 by bitsandbytes, without double quantization of the scales."""
    import torch
    from bitsandbytes import functional

    assert isinstance(format, NormalFloatFormat)
    packed, state = functional.quantize_4bit(
        torch.tensor(values), blocksize=format.block, quant_type="nf4"
    )
    high_and_low = np.stack([packed.numpy() >> 4, packed.numpy() & 15], -1)
    codes = high_and_low.reshape(values.shape)
    if format.double:
        return OracleCodes("bitsandbytes", codes, None)
    decoded = functional.dequantize_4bit(packed, state).numpy()
    return OracleCodes("bitsandbytes", codes, decoded)


def encode_by_torchao_mx(format: Format, values: np.ndarray) -> OracleCodes | None:
    """MX formats by torchao."""
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    assert isinstance(format, MicroscalingFormat)
    elements = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m1": torch.float4_e2m1fn_x2,
    }
    element = elements[format.element]
    mode = ScaleCalculationMode(format.scale_rule)
    scales, codes = to_mx(torch.tensor(values), element, 32, mode)
    decoded = to_dtype(codes, scales, element, 32, torch.float32)
    decoded = decoded.reshape(values.shape).numpy()
    integers = codes.view(torch.uint8).numpy()
    if format.element == "e2m1":
        integers = _split_bytes(integers)
    return OracleCodes("torchao", integers, decoded)


def encode_by_torchao_nvfp4(format: Format, values: np.ndarray) -> OracleCodes | None:
    """NVFP4 by torchao."""
    import torch
    from torchao.prototype.mx_formats import nvfp4_tensor
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32

    assert isinstance(format, Nvfp4Format)
    x = torch.tensor(values)
    scale = None
    if format.two_level:
        scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    scales, packed = nvfp4_tensor.nvfp4_quantize(x, 16, scale)
    codes = _split_bytes(packed.view(torch.uint8).numpy())
    numbers = f4_unpacked_to_f32(torch.tensor(codes)).numpy()
    all_scales = scales.float().numpy()
    if scale is not None:
        all_scales = all_scales * scale.numpy()
    decoded = numbers * np.repeat(all_scales, 16, 1)
    return OracleCodes("torchao", codes, decoded)


def encode_e8p_by_search(format: Format, values: np.ndarray) -> OracleCodes | None:
    """E8P by comparing each vector with all 65,536 points; minutes for 1e6 numbers."""
    assert isinstance(format, E8pFormat)
    points = np.asarray(decode_vectors(jnp.arange(65536, dtype=jnp.uint16)))
    lengths = np.square(points).sum(-1)
    scale = np.asarray(format.compute_scales(jnp.asarray(values)))
    vectors = (values / scale).reshape(-1, 8)
    nearest = [
        np.argmin(lengths - 2 * vectors[start : start + 512] @ points.T, -1)
        for start in range(0, len(vectors), 512)
    ]
    codes = np.concatenate(nearest).astype(np.uint16)
    decoded = points[codes].reshape(values.shape) * scale
    return OracleCodes("all points", codes.reshape(values.shape[0], -1), decoded)


def encode_by_ggml(format: Format, values: np.ndarray) -> OracleCodes | None:
    """GGML's formats by its own library and by gguf."""
    import libggml
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    read_rows = getattr(format, "from_bytes", None)
    type_name = getattr(format, "type_name", None)
    if read_rows is None or type_name is None:
        return None
    ggml_type = GGMLQuantizationType[type_name]
    library = ctypes.CDLL(str(files(libggml) / "lib64/libggml-base.so"))
    pointer = ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, pointer, pointer),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer),
    ]
    rows, columns = values.shape
    raw = np.zeros(values.nbytes, np.uint8)
    size = library.ggml_quantize_chunk(
        *(ggml_type.value, values.ctypes.data, raw.ctypes.data),
        *(0, rows, columns, None),
    )
    rows_raw = raw[:size].reshape(rows, -1)
    codes = read_codes(read_rows(rows_raw, columns))
    return OracleCodes("libggml", codes, dequantize(rows_raw, ggml_type))


def _import_torchao_blockwise() -> ModuleType:
    """Imports torchao's kernels of blockwise FP8, whose references are plain torch,
    where Triton is not installed too."""
    name = "torchao.prototype.blockwise_fp8_training.kernels"
    if find_spec("triton") is not None:
        return import_module(name)
    import_module("torchao")  # looks for Triton itself
    stand_ins = {"triton": MagicMock(), "triton.language": MagicMock()}
    with patch.dict(sys.modules, stand_ins):
        return import_module(name)


def _split_bytes(packed: np.ndarray) -> np.ndarray:
    """Returns two codes a byte, the low half first, as [R, C]."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
