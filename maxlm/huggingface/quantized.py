"""Published tensors that are stored quantized, read as what they stand for.

Two formats are published with weights themselves, not made of them later:

- MXFP4 (OCP Microscaling v1.0; gpt-oss): ``X_blocks`` uint8 [E, outputs, groups, 16],
  two e2m1 numbers a byte, the first in its low half, and ``X_scales`` uint8 [E, outputs,
  groups], the exponent (e8m0) of 32 numbers, which lie along the inputs. Unquantized
  files have ``X`` [E, inputs, outputs] in its place.
- FP8 by blocks (DeepSeek-V3, arXiv 2412.19437, §3.3.2): ``X.weight`` in e4m3, and
  ``X.weight_scale_inv``, which has a factor for each block of ``weight_block_size``
  rows and columns, cut off at the edges.

Both become bfloat16, which holds MXFP4 exactly, and to which FP8 is rounded as in
DeepSeek's own conversion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.files import StoredTensor, list_stored_tensors, read_tensor
from maxlm.runtime.json_files import read_json_object

CONFIG_KEY = "quantization_config"
_BLOCKS = "_blocks"
_SCALES = "_scales"
_FP8_SCALES = "_scale_inv"
_AGAIN = "download it again"
_VALUES_PER_GROUP = 32
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_CODES = np.concatenate([_E2M1, -_E2M1])
"""The numbers by their codes: the highest bit is the sign."""
_E8M0_BIAS = 127
_E8M0_NAN = 255


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """A tensor that files hold as codes and scales. ``path`` and ``offset`` are those of
    the codes; ``dtype`` is the format that it is read in."""

    codes: StoredTensor
    scales: StoredTensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> np.ndarray:
        """Returns fp32 values, all of which bfloat16 holds."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mxfp4Tensor(QuantizedTensor):
    """Matrices of experts in MXFP4."""

    def dequantize(self) -> np.ndarray:
        codes = read_tensor(self.codes)
        exponents = read_tensor(self.scales)
        values = np.empty(self.shape, np.float32)
        # One expert at a time: the codes' indices are as large as the values.
        for expert, matrix in enumerate(values):
            low = _E2M1_CODES[codes[expert] & 15]
            high = _E2M1_CODES[codes[expert] >> 4]
            pairs = np.stack([low, high], axis=-1)
            rows = pairs.reshape(*exponents[expert].shape, _VALUES_PER_GROUP)
            exponent = exponents[expert][..., None]
            scaled = np.ldexp(rows, exponent.astype(np.int32) - _E8M0_BIAS)
            scaled = np.where(exponent == _E8M0_NAN, np.float32(np.nan), scaled)
            matrix[...] = scaled.reshape(len(rows), -1).T
        return values


@dataclass(frozen=True)
class BlockFp8Tensor(QuantizedTensor):
    """A matrix in FP8, with a scale for each block."""

    block_shape: tuple[int, int]

    def dequantize(self) -> np.ndarray:
        values = read_tensor(self.codes, np.dtype(np.float32))
        scales = read_tensor(self.scales, np.dtype(np.float32))
        block_rows, block_columns = self.block_shape
        num_columns = values.shape[1]
        for block, row_scales in enumerate(scales):
            rows = slice(block * block_rows, (block + 1) * block_rows)
            # The last block is cut off at the edge.
            column_scales = np.repeat(row_scales, block_columns)[:num_columns]
            scaled = values[rows] * column_scales
            values[rows] = scaled.astype(ml_dtypes.bfloat16)
        return values


def read_model_tensor(stored: StoredTensor) -> np.ndarray:
    """Returns a tensor's values in fp32."""
    if isinstance(stored, QuantizedTensor):
        return stored.dequantize()
    return read_tensor(stored, np.dtype(np.float32))


def list_model_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a model's folder, those that are stored quantized under
    their names in unquantized files. Raises MaxlmError as
    :func:`~maxlm.huggingface.files.list_stored_tensors`, and where codes and scales do
    not fit."""
    folder = Path(folder)
    tensors = list_stored_tensors(folder)
    config = folder / "config.json"
    if not config.exists():
        return tensors
    quantization = read_json_object(config, _AGAIN).get(CONFIG_KEY)
    if not isinstance(quantization, Mapping):
        return tensors
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return _join_mxfp4(tensors)
    if method == "fp8":
        return _join_block_fp8(tensors, _read_block_shape(quantization, str(config)))
    return tensors


def _join_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    joined = dict(tensors)
    for name, codes in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        plain_name = name.removesuffix(_BLOCKS)
        scales = joined.pop(plain_name + _SCALES, None)
        if scales is None:
            raise _lacks_scales(codes, plain_name + _SCALES)
        *lead, groups, group_bytes = codes.shape if len(codes.shape) == 4 else (0, 0)
        is_packed = codes.dtype == scales.dtype == "U8" and group_bytes == 16
        if not is_packed or scales.shape != (*lead, groups):
            raise _does_not_fit(codes, scales)
        num_experts, outputs = lead
        shape = (num_experts, groups * _VALUES_PER_GROUP, outputs)
        del joined[name]
        joined[plain_name] = Mxfp4Tensor(
            plain_name, codes.path, "BF16", shape, codes.offset, codes, scales
        )
    return joined


def _join_block_fp8(
    tensors: Mapping[str, StoredTensor], block_shape: tuple[int, int]
) -> dict[str, StoredTensor]:
    joined = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype != "F8_E4M3":
            continue
        scales = joined.pop(name + _FP8_SCALES, None)
        if scales is None:
            raise _lacks_scales(codes, name + _FP8_SCALES)
        if len(codes.shape) != 2:
            raise _does_not_fit(codes, scales)
        blocks = tuple(
            -(-size // width)
            for size, width in zip(codes.shape, block_shape, strict=True)
        )
        if scales.shape != blocks or not scales.dtype.startswith(("F", "BF")):
            raise _does_not_fit(codes, scales)
        joined[name] = BlockFp8Tensor(
            name,
            codes.path,
            "BF16",
            codes.shape,
            codes.offset,
            codes,
            scales,
            block_shape,
        )
    return joined


def _read_block_shape(quantization: Mapping[str, Any], where: str) -> tuple[int, int]:
    shape = quantization.get("weight_block_size")
    sizes = shape if isinstance(shape, list) else []
    are_sizes = all(type(size) is int and size > 0 for size in sizes)
    if len(sizes) != 2 or not are_sizes:
        message = f"{CONFIG_KEY}.weight_block_size={shape!r} is not a pair of sizes"
        fix = "use a model with a scale for each block, or one in bf16"
        raise MaxlmError(message, where=where, fix=fix)
    rows, columns = sizes
    return rows, columns


def _lacks_scales(codes: StoredTensor, name: str) -> MaxlmError:
    message = f"{codes.name} is stored quantized, and the files lack {name}"
    return MaxlmError(message, where=str(codes.path), fix=_AGAIN)


def _does_not_fit(codes: StoredTensor, scales: StoredTensor) -> MaxlmError:
    message = (
        f"{codes.name} is {codes.dtype} {list(codes.shape)}, its scales are "
        f"{scales.dtype} {list(scales.shape)}"
    )
    fix = "take config.json and all files from the published model"
    return MaxlmError(message, where=str(codes.path), fix=fix)
