"""GGUF files, written tensor by tensor: what each will be is known beforehand, so a file
begins with its final header, and every tensor goes straight to its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.files import SLAB_BYTES
from maxlm.huggingface.gguf.container import Value, count_tensor_bytes
from maxlm.huggingface.gguf.library import import_gguf
from maxlm.huggingface.gguf.tensors import PLAIN

_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    type_name: str
    """Name of its number format: "Q4_K"."""
    shape: tuple[int, ...]
    """Outputs before inputs."""

    @property
    def nbytes(self) -> int:
        return count_tensor_bytes(self.type_name, self.shape)


class GgufFileWriter:
    """A file of which all tensors are still to be written, in any order.

    Args:
        metadata: values by their full keys but ``general.architecture``. A float is
            written as fp32, an int as uint32, or in a list as int32.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, TensorSpec],
    ):
        gguf = import_gguf()
        self._path = path
        self._specs = dict(tensors)
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_custom_alignment(_ALIGNMENT)
        for key, value in metadata.items():
            _add_value(writer, key, value)
        for name, spec in tensors.items():
            type_id = gguf.GGMLQuantizationType[spec.type_name]
            # The writer asks for a dtype; ``raw_dtype`` counts.
            writer.add_tensor_info(
                name, spec.shape, np.dtype(np.float32), spec.nbytes, type_id
            )
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        sizes = [_pad(spec.nbytes) for spec in self._specs.values()]
        start = _pad(path.stat().st_size)
        offsets = list(accumulate(sizes, initial=start))
        self._offsets = dict(zip(self._specs, offsets, strict=False))
        with path.open("r+b") as file:
            file.truncate(offsets[-1])

    def write(self, name: str, values: np.ndarray, expert: int | None = None) -> None:
        """Writes a tensor of fp32 values, or one expert's of a stack."""
        spec = self._specs[name]
        shape = spec.shape if expert is None else spec.shape[1:]
        assert values.shape == shape, (name, values.shape, shape)
        rows = values.reshape(-1, shape[-1])
        offset = self._offsets[name]
        if expert is not None:
            offset += expert * count_tensor_bytes(spec.type_name, shape)
        with self._path.open("r+b") as file:
            file.seek(offset)
            rows_per_slab = max(1, SLAB_BYTES // (4 * shape[-1]))
            for start in range(0, len(rows), rows_per_slab):
                slab = rows[start : start + rows_per_slab]
                data = encode_rows(slab, spec.type_name, rows_per_slab, name)
                file.write(data.data)


def encode_rows(
    rows: np.ndarray, type_name: str, rows_per_slab: int, name: str
) -> np.ndarray:
    """Returns the bytes of fp32 rows [R, C] in a number format: uint8 [R, bytes of a
    row]. Raises MaxlmError, which names the tensor ``name``: a value that is too large,
    or none.

    Args:
        rows_per_slab: fewer rows are filled up to as many, so that one compilation
            serves all.
    """
    if not np.isfinite(rows).all():
        message = "values are NaN or infinite"
        fix = "write the checkpoint of another step"
        raise MaxlmError(message, where=name, fix=fix)
    if type_name in PLAIN:
        with np.errstate(over="ignore"):
            plain = np.ascontiguousarray(rows.astype(PLAIN[type_name]))
        if type_name == "F16" and not np.isfinite(plain).all():
            fix = "choose --quantization bf16 or f32"
            raise MaxlmError("values too large for F16", where=name, fix=fix)
        return plain.view(np.uint8)
    num_rows = len(rows)
    padding = np.zeros((rows_per_slab - num_rows, rows.shape[1]), np.float32)
    full = np.concatenate([rows, padding]) if len(padding) else rows
    return np.ascontiguousarray(_get_encoder(type_name)(full)[:num_rows])


@cache
def _get_encoder(type_name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what encodes fp32 rows [R, C] in a number format."""
    import jax

    from maxlm.quantization.formats.ggml import get_ggml_format

    number_format = get_ggml_format(type_name)
    encode = jax.jit(number_format.encode)
    return lambda rows: number_format.to_bytes(encode(rows))


def _pad(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _add_value(writer: Any, key: str, value: Value) -> None:
    gguf = import_gguf()
    types = gguf.GGUFValueType
    element_type = None
    if isinstance(value, bool):
        kind = types.BOOL
    elif isinstance(value, int):
        kind = types.UINT32
    elif isinstance(value, float):
        kind = types.FLOAT32
    elif isinstance(value, str):
        kind = types.STRING
    else:
        kind = types.ARRAY
        first = value[0]
        if isinstance(first, bool):
            element_type = types.BOOL
        elif isinstance(first, int):
            element_type = types.INT32
        else:
            element_type = types.FLOAT32 if isinstance(first, float) else types.STRING
    writer.add_key_value(key, value, kind, element_type)
