"""Blocks as GGML's files have them, and the arrays that we keep them in.

GGML stores a row as an array of structs, one a block; :class:`BlockField` is a member
of that struct. We keep an array per member, codes in the order of
:mod:`maxlm.quantization.formats.packing`. Numpy: this is for files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class BlockField:
    """A member of a block.

    Args:
        plane: the array that has it.
        num_bytes: its bytes in a block.
        dtype: of the array.
        code_bits: of packed codes; 0: it is no packed codes.
        code_stride: how far codes of the same byte are apart in the row; a run of
            ``8 / code_bits * code_stride`` codes is whole bytes.
    """

    plane: str
    num_bytes: int
    dtype: DTypeLike = np.uint8
    code_bits: int = 0
    code_stride: int = 0

    @property
    def num_items(self) -> int:
        """Items of the array a block."""
        return self.num_bytes // np.dtype(self.dtype).itemsize


def half_field(plane: str) -> BlockField:
    """Returns the field of a scale in float16."""
    return BlockField(plane, 2, np.float16)


def code_field(bits: int, stride: int, block_columns: int) -> BlockField:
    """Returns the field of packed codes, or of these of their bits: array ``codes4``
    for 4 bits."""
    num_bytes = block_columns * bits // 8
    return BlockField(f"codes{bits}", num_bytes, np.uint8, bits, stride)


def split_blocks(
    raw: np.ndarray, fields: Sequence[BlockField]
) -> dict[str, np.ndarray]:
    """Returns the arrays [..., R, items] by name of rows of blocks, uint8 [..., R,
    bytes]."""
    block_bytes = sum(field.num_bytes for field in fields)
    blocks = raw.reshape(*raw.shape[:-1], -1, block_bytes)
    planes = {}
    start = 0
    for field in fields:
        member = blocks[..., start : start + field.num_bytes]
        start += field.num_bytes
        if field.code_bits:
            stride = 4 * field.code_bits
            member = _restride(member, field.code_bits, field.code_stride, stride)
        items = np.ascontiguousarray(member).view(field.dtype)
        planes[field.plane] = items.reshape(*raw.shape[:-1], -1)
    return planes


def join_blocks(
    planes: Mapping[str, np.ndarray], fields: Sequence[BlockField]
) -> np.ndarray:
    """Returns rows of blocks, uint8 [..., R, bytes]; inverts :func:`split_blocks`."""
    members = []
    for field in fields:
        items = np.ascontiguousarray(planes[field.plane], dtype=field.dtype)
        member = items.view(np.uint8)
        member = member.reshape(*member.shape[:-1], -1, field.num_bytes)
        if field.code_bits:
            stride = 4 * field.code_bits
            member = _restride(member, field.code_bits, stride, field.code_stride)
        members.append(member)
    blocks = np.concatenate(members, axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)


def _restride(packed: np.ndarray, bits: int, stride: int, new_stride: int):
    """Returns the same codes in bytes that hold codes ``new_stride`` apart."""
    if stride == new_stride:
        return packed
    per_byte = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = packed.reshape(*packed.shape[:-1], -1, 1, stride)
    codes = (groups >> shifts) & np.uint8((1 << bits) - 1)
    groups = codes.reshape(*packed.shape[:-1], -1, per_byte, new_stride)
    repacked = np.bitwise_or.reduce(groups << shifts, axis=-2)
    return repacked.reshape(packed.shape)
