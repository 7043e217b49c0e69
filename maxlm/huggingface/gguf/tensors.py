"""Tensors of GGUF files, under the names and in the layout of Hugging Face's files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.files import SLAB_BYTES, StoredTensor
from maxlm.huggingface.gguf.container import TensorPlace, get_block_sizes
from maxlm.huggingface.gguf.library import import_gguf
from maxlm.huggingface.gguf.rows import RowOrder
from maxlm.huggingface.quantized import QuantizedTensor

if TYPE_CHECKING:
    from maxlm.quantization.formats.format import Planes
    from maxlm.quantization.formats.ggml import GgmlFormat

_AGAIN = "download it again"
PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}
"""Number formats that are not in blocks."""


@dataclass(frozen=True)
class GgufTensor(QuantizedTensor):
    """A tensor of a GGUF file. ``codes`` are its bytes, uint8 [..., rows, bytes of a
    row], among which its scales lie too; ``shape`` is Hugging Face's."""

    type_name: str
    """Name of its number format, as gguf.GGMLQuantizationType has it: "Q4_K"."""
    num_columns: int
    """Values of a row, in the file."""
    row_order: RowOrder | None = None
    """The order of its rows there; None: Hugging Face's."""
    added: float = 0.0
    """What the file's values are above Hugging Face's: norms that multiply by 1 + scale
    are stored as the sum."""
    is_transposed: bool = False
    """Whether Hugging Face's files have its inputs before its outputs (GPT-2)."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def read_planes(self) -> "tuple[GgmlFormat, Planes]":
        """Returns the number format, and the codes and scales as they are, rows [R, C]
        in Hugging Face's order. Raises MaxlmError: a number format that has none, or a
        matrix whose inputs come first in Hugging Face's files."""
        from maxlm.quantization.formats.ggml import get_ggml_format

        if self.type_name in PLAIN or self.is_transposed:
            message = f"{self.name} is {self.type_name}, and has no codes to keep"
            fix = "read its values"
            raise MaxlmError(message, where=str(self.path), fix=fix)
        number_format = get_ggml_format(self.type_name)
        raw = np.concatenate(list(self._read_slabs()))
        return number_format, number_format.from_bytes(
            self._reorder(raw), self.num_columns
        )

    def dequantize(self) -> np.ndarray:
        """Returns fp32 values, in Hugging Face's layout."""
        num_rows = self.codes.shape[0]
        values = np.empty((num_rows, self.num_columns), np.float32)
        start = 0
        for slab in self._read_slabs():
            stop = start + len(slab)
            values[start:stop] = _decode(slab, self.type_name)
            start = stop
        values = self._reorder(values)
        if self.added:
            values -= np.float32(self.added)
        if self.is_transposed:
            values = values.T
        return values.reshape(self.shape)

    def _reorder(self, rows: np.ndarray) -> np.ndarray:
        if self.row_order is None:
            return rows
        ordered = np.empty_like(rows)
        ordered[self.row_order.list_rows(len(rows))] = rows
        return ordered

    def _read_slabs(self) -> Iterator[np.ndarray]:
        """Yields the bytes of rows, uint8 [rows, bytes of a row], in order."""
        num_rows, row_bytes = self.codes.shape
        rows_per_slab = max(1, SLAB_BYTES // row_bytes)
        try:
            with self.path.open("rb") as file:
                file.seek(self.codes.offset)
                for start in range(0, num_rows, rows_per_slab):
                    count = min(rows_per_slab, num_rows - start)
                    data = file.read(count * row_bytes)
                    if len(data) != count * row_bytes:
                        raise OSError(f"it ends within {self.name}")
                    yield np.frombuffer(data, np.uint8).reshape(count, row_bytes)
        except OSError as error:
            message = f"cannot be read ({error})"
            raise MaxlmError(message, where=str(self.path), fix=_AGAIN) from error


def place_tensor(
    place: TensorPlace,
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    expert: int | None = None,
    row_order: RowOrder | None = None,
    added: float = 0.0,
    is_transposed: bool = False,
) -> GgufTensor:
    """Returns a tensor of a file as Hugging Face's of the name ``name``.

    Args:
        shape: Hugging Face's, where it is not that of the file.
        expert: which matrix of a stack [experts, rows, columns].
    """
    stored_shape = place.shape
    offset = place.offset
    nbytes = place.nbytes
    if expert is not None:
        num_experts, *matrix = stored_shape
        stored_shape = tuple(matrix)
        nbytes //= num_experts
        offset += expert * nbytes
    *lead, num_columns = stored_shape
    if not lead and place.type_name in PLAIN:
        # A vector's numbers are rows, which may stand in another order.
        lead = [num_columns]
        num_columns = 1
    num_rows = int(np.prod(lead))
    raw_shape = (num_rows, nbytes // num_rows)
    codes = StoredTensor(place.name, place.path, "U8", raw_shape, offset)
    if shape is None:
        shape = stored_shape[::-1] if is_transposed else stored_shape
    # Values that these hold exactly are written again as what they are.
    dtype = place.type_name if place.type_name in ("F16", "BF16") else "F32"
    return GgufTensor(
        name,
        place.path,
        dtype,
        shape,
        offset,
        codes,
        codes,
        type_name=place.type_name,
        num_columns=num_columns,
        row_order=row_order,
        added=added,
        is_transposed=is_transposed,
    )


def _decode(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Returns the values [rows, columns] of rows of bytes, fp32."""
    if type_name in PLAIN:
        return raw.view(PLAIN[type_name]).astype(np.float32)
    gguf = import_gguf()
    type_id = gguf.GGMLQuantizationType[type_name]
    return gguf.quants.dequantize(raw, type_id)


def check_readable(place: TensorPlace) -> None:
    """Checks that a tensor's number format can be decoded. Raises MaxlmError."""
    if place.type_name in PLAIN:
        return
    _, bytes_per_block = get_block_sizes(place.type_name)
    try:
        _decode(np.zeros((1, bytes_per_block), np.uint8), place.type_name)
    except NotImplementedError:
        message = f"{place.name} is stored as {place.type_name}, which is not read"
        fix = "use another quantization of the model, such as Q4_K_M"
        raise MaxlmError(message, where=str(place.path), fix=fix) from None
