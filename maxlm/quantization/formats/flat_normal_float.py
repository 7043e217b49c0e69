"""NF4 in the order of bitsandbytes' files: blocks of 64 consecutive numbers of a flat
array, two codes a byte, and the largest magnitudes of 256 consecutive blocks under one
scale (bitsandbytes 0.50, ``quantize_4bit`` and its portable kernels). Numpy: this is
for files."""

from dataclasses import dataclass

import numpy as np

from maxlm.quantization.formats.normal_float import (
    NESTED_BLOCK,
    NF4_CODES,
    compute_dynamic_map,
    find_midpoints,
)

SMALLEST_DIVISOR = np.float32(1e-38)
"""What a block of zeros is divided by, as in bitsandbytes."""


@dataclass(frozen=True)
class FlatNested:
    """Largest magnitudes of blocks after double quantization.

    Args:
        scales: fp32 [blocks / 256, rounded up].
        offset: the mean of the magnitudes, fp32.
        dynamic_map: fp32 [256], what their codes stand for.
    """

    scales: np.ndarray
    offset: np.float32
    dynamic_map: np.ndarray


@dataclass(frozen=True)
class FlatNormalFloat:
    """An array in NF4.

    Args:
        codes: uint8 [numbers / 2, rounded up]; the first number is in the high half.
        maxima: the largest magnitude of each block, fp32; or uint8 codes of it.
        nested: what these codes mean; None: they are fp32.
        block: consecutive numbers that share a scale.
    """

    codes: np.ndarray
    maxima: np.ndarray
    nested: FlatNested | None
    block: int = 64


def encode_flat_normal_float(
    values: np.ndarray,
    block: int = 64,
    double: bool = True,
    dynamic_map: np.ndarray | None = None,
) -> FlatNormalFloat:
    """Quantizes an array as bitsandbytes does, its last block filled up with zeros.

    The codes equal bitsandbytes' to the bit, and those of the magnitudes its portable
    kernel's, given the same offset: bitsandbytes adds in fp32 what is added in fp64
    here, and its CPU kernel looks magnitudes up in a table of 2^16.

    Args:
        dynamic_map: fp32 [256], default: ours.
    """
    if dynamic_map is None:
        dynamic_map = compute_dynamic_map()
    maxima, codes = _round_to_nearest(values, block, np.asarray(NF4_CODES, np.float32))
    if codes.size % 2:
        codes = np.append(codes, np.uint8(_ZERO_CODE))
    packed = (codes[::2] << 4) | codes[1::2]
    if not double:
        return FlatNormalFloat(packed, maxima, None, block)
    offset = np.float32(maxima.mean(dtype=np.float64))
    scales, maximum_codes = _round_to_nearest(
        maxima - offset, NESTED_BLOCK, dynamic_map
    )
    nested = FlatNested(scales, offset, dynamic_map)
    return FlatNormalFloat(packed, maximum_codes, nested, block)


def decode_flat_normal_float(array: FlatNormalFloat, size: int) -> np.ndarray:
    """Returns the fp32 numbers [size] of an array."""
    halves = np.stack([array.codes >> 4, array.codes & 15], -1)
    numbers = np.asarray(NF4_CODES, np.float32)[halves.reshape(-1)[:size]]
    maxima = decode_flat_maxima(array)
    return numbers * np.repeat(maxima, array.block)[:size]


def decode_flat_maxima(array: FlatNormalFloat) -> np.ndarray:
    """Returns the fp32 largest magnitude of each block."""
    nested = array.nested
    if nested is None:
        return array.maxima.astype(np.float32)
    scales = np.repeat(nested.scales, NESTED_BLOCK)[: array.maxima.size]
    return nested.dynamic_map[array.maxima] * scales + nested.offset


_ZERO_CODE = NF4_CODES.index(0.0)


def _round_to_nearest(
    values: np.ndarray, block: int, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fp32 largest magnitude of each block, and of each value divided by it
    the uint8 index of the nearest of the ascending numbers."""
    flat = values.reshape(-1).astype(np.float32)
    padded = np.pad(flat, (0, -flat.size % block))
    blocks = padded.reshape(-1, block)
    maxima = np.abs(blocks).max(-1)
    factors = np.float32(1) / np.maximum(maxima, SMALLEST_DIVISOR)
    scaled = np.clip(blocks * factors[:, None], -1, 1)
    codes = np.searchsorted(find_midpoints(numbers), scaled.reshape(-1)[: flat.size])
    return maxima, codes.astype(np.uint8)
