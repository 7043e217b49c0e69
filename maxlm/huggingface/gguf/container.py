"""The container: metadata by key, and where each tensor's bytes lie.

A file begins with the letters GGUF, a version, the numbers of tensors and of keys; then
come the keys with their values, the tensors' names, sizes, types and offsets, and from
the next multiple of ``general.alignment`` on their bytes. Numbers are little-endian.

gguf-py has a reader too, which makes an array of every string (seconds for a vocabulary
of 150,000) and trusts each length. A file comes from anyone: here what a length or
offset points at is checked first.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.library import import_gguf
from maxlm.runtime.json_files import check_regular_file

_MAGIC = b"GGUF"
_AGAIN = "download it again"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING = 8
_ARRAY = 9
_BOOL = 7
_NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Numbers by the ids of their types."""
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")

Value = Any
"""A number, bool or string, a list of strings, or an array of numbers."""


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file, as its header has it."""

    name: str
    path: Path
    type_name: str
    """Name of its number format, as gguf.GGMLQuantizationType has it: "Q4_K"."""
    shape: tuple[int, ...]
    """Outputs before inputs, the reverse of the file's own order."""
    offset: int
    """Offset of its first byte in the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A file's header; of a model in several files, those of all."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorPlace]


def read_gguf(path: str | Path) -> GgufFile:
    """Reads the header of a file, and those of its shards where it is the first of
    several. Raises MaxlmError: there is none, it is not a GGUF file, damaged, or of a
    version or number format that is not read."""
    path = Path(path)
    first = _read_header(path)
    num_shards = first.metadata.get("split.count", 0)
    if num_shards in (0, 1):
        return first
    tensors = dict(first.tensors)
    for shard_path in _list_other_shards(path, num_shards):
        tensors |= _read_header(shard_path).tensors
    return GgufFile(path, first.metadata, tensors)


def count_tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor whose rows are whole blocks of its format."""
    values_per_block, bytes_per_block = get_block_sizes(type_name)
    return int(np.prod(shape, dtype=object)) // values_per_block * bytes_per_block


def get_block_sizes(type_name: str) -> tuple[int, int]:
    """Returns the values of a block of a number format, and its bytes."""
    gguf = import_gguf()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]


def _list_other_shards(path: Path, num_shards: int) -> list[Path]:
    match = _SHARD.fullmatch(path.stem)
    if match is None or match[2] != "00001" or int(match[3]) != num_shards:
        message = f"one of {num_shards} files of a model, and not the first"
        fix = "put all into one folder, and name NAME-00001-of-*.gguf"
        raise MaxlmError(message, where=str(path), fix=fix)
    numbers = range(2, num_shards + 1)
    return [
        path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{path.suffix}")
        for number in numbers
    ]


def _read_header(path: Path) -> GgufFile:
    fix = "name a GGUF file"
    check_regular_file(path, fix)
    try:
        size = path.stat().st_size
        if size < len(_MAGIC):
            raise MaxlmError("not a GGUF file", where=str(path), fix=fix)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _HeaderReader(path, data).read()
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise MaxlmError(message, where=str(path), fix=fix) from None


class _HeaderReader:
    """Reads a header from its first byte on."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path = path
        self._data = data
        self._position = 0

    def read(self) -> GgufFile:
        if self._take(len(_MAGIC), "its magic") != _MAGIC:
            fix = "name a GGUF file"
            raise MaxlmError("not a GGUF file", where=str(self._path), fix=fix)
        version = self._number("<I", "its version")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                message = "its numbers are big-endian, which is not read"
            else:
                message = f"GGUF version {version} is not read, only 2 and 3 are"
            fix = "convert the model again with a current llama.cpp"
            raise MaxlmError(message, where=str(self._path), fix=fix)
        num_tensors = self._number("<Q", "its number of tensors")
        num_keys = self._number("<Q", "its number of keys")
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._string("a key")
            if key in metadata:
                raise self._damaged(f"{key} is there twice")
            metadata[key] = self._value(self._number("<I", key), key)
        headers = [self._tensor_header() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        is_size = type(alignment) is int and alignment > 0
        if not is_size or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment={alignment!r}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorPlace] = {}
        for name, type_name, shape, offset in headers:
            if name in tensors:
                raise self._damaged(f"{name} is there twice")
            nbytes = count_tensor_bytes(type_name, shape)
            if start + offset + nbytes > len(self._data):
                raise self._damaged(f"it ends within {name}")
            tensors[name] = TensorPlace(
                name, self._path, type_name, shape, start + offset, nbytes
            )
        return GgufFile(self._path, metadata, tensors)

    def _tensor_header(self) -> tuple[str, str, tuple[int, ...], int]:
        """A tensor's name, format, shape, and offset behind the header."""
        gguf = import_gguf()
        name = self._string("a tensor's name")
        num_dimensions = self._number("<I", name)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {num_dimensions} dimensions")
        sizes = [self._number("<Q", name) for _ in range(num_dimensions)]
        type_id = self._number("<I", name)
        offset = self._number("<Q", name)
        try:
            type_name = gguf.GGMLQuantizationType(type_id).name
        except ValueError:
            message = f"{name} has the number format {type_id}, which is unknown"
            fix = "update the package gguf, or use another quantization of the model"
            raise MaxlmError(message, where=str(self._path), fix=fix) from None
        values_per_block, _ = get_block_sizes(type_name)
        if 0 in sizes or sizes[0] % values_per_block:
            raise self._damaged(f"{name} is {sizes} in {type_name}")
        return name, type_name, tuple(reversed(sizes)), offset

    def _value(self, type_id: int, key: str) -> Value:
        if type_id == _STRING:
            return self._string(key)
        if type_id != _ARRAY:
            return self._array(type_id, 1, key)[0].item()
        element_type = self._number("<I", key)
        count = self._number("<Q", key)
        if element_type != _STRING:
            return self._array(element_type, count, key)
        if count > len(self._data):
            raise self._damaged(f"it ends within {key}")
        return [self._string(key) for _ in range(count)]

    def _array(self, type_id: int, count: int, key: str) -> np.ndarray:
        dtype = _NUMBERS.get(type_id)
        if dtype is None:
            raise self._damaged(f"{key} has a value of the type {type_id}")
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _string(self, name: str) -> str:
        data = self._take(self._number("<Q", name), name)
        # Tokens of a damaged vocabulary may be no Unicode; llama.cpp does not look.
        return data.decode("utf-8", "replace")

    def _number(self, layout: str, name: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout), name))
        return value

    def _take(self, count: int, name: str) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self._damaged(f"it ends within {name}")
        data = self._data[self._position : end]
        self._position = end
        return data

    def _damaged(self, fault: str) -> MaxlmError:
        # Names come from the file: they may be anything, of any length.
        shown = "".join(char if char.isprintable() else "?" for char in fault[:200])
        message = f"damaged GGUF file ({shown})"
        return MaxlmError(message, where=str(self._path), fix=_AGAIN)
