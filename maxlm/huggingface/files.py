"""Folders of safetensors files, read and written a tensor at a time; number formats,
and casting that loses nothing unasked.

The safetensors library checks each header (lengths, offsets, holes, shapes); bytes are
read and written here, because into NumPy it has no float8, cannot cast on the way, and
writes whole files alone. Nothing is unpickled.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.runtime.json_files import check_regular_file, read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Bytes of a file, as large as published ones are."""
SLAB_BYTES = 4 << 20
"""Tensors are cast and written in pieces of about this size, so that no second copy
exists."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "download it again"

NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""NumPy's dtypes by their names in safetensors files."""

Kind = tuple[str, tuple[int, ...]]
"""A dtype as safetensors names it, and a shape."""


class TensorDtypes(Config):
    """Number format of each tensor in safetensors files."""

    default: str
    """Format of most tensors, as safetensors names it ("BF16")."""
    exceptions: Mapping[str, str] = Field(default_factory=dict)
    """Formats of other tensors, by their names there."""

    def get_dtype(self, name: str) -> str:
        return self.exceptions.get(name, self.default)

    def with_names(self, names: Mapping[str, str]) -> "TensorDtypes":
        """Returns the formats under other names; ``names``: old → new, of all
        tensors."""
        kinds = {names[name]: dtype for name, dtype in self.exceptions.items()}
        return TensorDtypes(default=self.default, exceptions=kinds)

    @classmethod
    def from_dtypes(cls, dtypes: Mapping[str, str]) -> "TensorDtypes":
        """Makes the shortest description of each tensor's own."""
        ((default, _),) = Counter(dtypes.values()).most_common(1)
        exceptions = {name: dtype for name, dtype in dtypes.items() if dtype != default}
        return cls(default=default, exceptions=exceptions)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    path: Path
    dtype: str
    """Format's name in safetensors."""
    shape: tuple[int, ...]
    offset: int
    """Offset of its first byte in the file."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * NUMPY[self.dtype].itemsize


def list_stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Returns all tensors of model.safetensors, or of the shards that its index names;
    reads only headers. Raises MaxlmError: no such files, only pickled ones, a damaged
    file, or a number format that NumPy does not have."""
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        files = [SINGLE]
    elif index.exists():
        files = _list_indexed_files(index)
    else:
        raise _describe_lack(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= list_file_tensors(folder / file)
    return tensors


def _list_indexed_files(index: Path) -> list[str]:
    """The files beside an index that it names; one elsewhere is refused: a checkpoint's
    folder is the whole of it, and what lies outside is not its author's to have
    read."""
    files = read_json_object(index, _AGAIN).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(file, str) for file in files.values()
    ):
        message = "no index of safetensors files (a JSON object with a weight_map)"
        raise MaxlmError(message, where=str(index), fix=_AGAIN)
    names = sorted(set(files.values()))
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            message = f"the index names {name!r}, which is no file in its own folder"
            fix = "download the checkpoint again, and put all its files into one folder"
            raise MaxlmError(message, where=str(index), fix=fix)
    return names


def read_tensor(
    stored: StoredTensor, dtype: np.dtype | None = None, *, lossy: bool = False
) -> np.ndarray:
    """Returns a tensor's values, in its own number format or cast on the way to
    ``dtype``."""
    values = np.empty(stored.shape, dtype or NUMPY[stored.dtype])
    flat_values = values.reshape(-1)  # a view
    start = 0
    for chunk in iterate_flat_chunks(stored):
        stop = start + len(chunk)
        flat_values[start:stop] = cast_values(
            chunk, values.dtype, where=stored.name, lossy=lossy
        )
        start = stop
    return values


def iterate_flat_chunks(stored: StoredTensor) -> Iterator[np.ndarray]:
    """Yields a tensor's values in order, as 1-D arrays that are only valid until the
    next."""
    dtype = NUMPY[stored.dtype]
    values_per_chunk = min(stored.size, SLAB_BYTES // dtype.itemsize)
    buffer = np.empty(values_per_chunk, dtype)
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            # A tensor without values has a buffer without any, and no chunk.
            for start in range(0, stored.size, max(1, values_per_chunk)):
                chunk = buffer[: stored.size - start]
                num_read = file.readinto(chunk.view(np.uint8).data)
                if num_read != chunk.nbytes:
                    raise OSError(f"it ends within {stored.name}")
                yield chunk
    except OSError as error:
        raise MaxlmError(
            f"cannot be read ({error})", where=str(stored.path), fix=_AGAIN
        ) from error


def list_file_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of one file; raises as :func:`list_stored_tensors`."""
    from safetensors import SafetensorError, safe_open

    check_regular_file(path, _AGAIN)
    try:
        with safe_open(path, "np") as file:
            names = file.offset_keys()
            slices = {name: file.get_slice(name) for name in names}
            kinds = {
                name: (tensor.get_dtype(), tuple(tensor.get_shape()))
                for name, tensor in slices.items()
            }
        with path.open("rb") as file:
            # Eight bytes hold the header's length; tensors begin behind the header.
            header_length = int.from_bytes(file.read(8), "little")
            offset = 8 + header_length
    except (SafetensorError, OSError) as error:
        text = str(error).removeprefix("Error while deserializing header: ")
        reason = text.splitlines()[0][:100] if text else type(error).__name__
        message = f"no complete safetensors file ({reason})"
        raise MaxlmError(message, where=str(path), fix=_AGAIN) from error
    tensors: dict[str, StoredTensor] = {}
    # One after the other without holes: the library has checked that.
    for name in names:
        dtype, shape = kinds[name]
        if dtype not in NUMPY:
            fix = f"use a version stored as one of {', '.join(NUMPY)}"
            raise MaxlmError(f"{name} is stored as {dtype}", where=str(path), fix=fix)
        tensors[name] = StoredTensor(name, path, dtype, shape, offset)
        offset += tensors[name].nbytes
    return tensors


def _describe_lack(folder: Path) -> MaxlmError:
    where = str(folder)
    fix = "name a folder with safetensors files"
    if not folder.is_dir():
        return MaxlmError("no folder here", where=where, fix=fix)
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_PICKLES):
            message = f"{path.name} is a pickle, which can run any code when it is read"
            fix = (
                "fetch the model as safetensors; or, only if you trust it, load it "
                "with transformers (from_pretrained) and write it with save_pretrained"
            )
            return MaxlmError(message, where=where, fix=fix)
    return MaxlmError(f"neither {SINGLE} nor {INDEX} here", where=where, fix=fix)


class SafetensorsWriter:
    """Safetensors files in an empty folder, of which all tensors are still to be
    written, in any order: dtypes and shapes are known beforehand, so each file begins
    with its final header, and every tensor goes straight to its place. A file holds
    ``shard_bytes``, or one larger tensor."""

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, Kind],
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder = Path(folder)
        self._places: dict[str, StoredTensor] = {}
        shards = _split_into_shards(tensors, shard_bytes)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            path = self.folder / (name if len(shards) > 1 else SINGLE)
            header, placed = _place_tensors(path, shard)
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(stored.nbytes for stored in shard))
            self._places |= {stored.name: stored for stored in placed}
        if len(shards) > 1:
            files = {
                name: stored.path.name for name, stored in sorted(self._places.items())
            }
            total = sum(stored.nbytes for stored in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, values: np.ndarray, *, lossy: bool = False) -> None:
        """Writes one tensor, cast to the format it was announced with."""
        stored = self._places[name]
        if values.shape != stored.shape:
            message = (
                f"is {list(values.shape)} in the checkpoint, not {list(stored.shape)}"
            )
            raise MaxlmError(
                message, where=name, fix="use the config it was trained with"
            )
        with stored.path.open("r+b") as file:
            file.seek(stored.offset)
            for slab in split_into_slabs(values):
                data = cast_values(slab, NUMPY[stored.dtype], where=name, lossy=lossy)
                file.write(data.reshape(-1).view(np.uint8).data)


def is_floating(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def cast_values(
    values: np.ndarray, dtype: np.dtype, *, where: str, lossy: bool = False
) -> np.ndarray:
    """Casts ``values``, which a message calls ``where``, to ``dtype``; returns them if
    they are that already. ``lossy`` rounds what does not fit exactly. Raises
    MaxlmError: a value would change and not ``lossy``; or would be infinite, or no
    number, where it was finite."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(dtype)
        if np.can_cast(values.dtype, dtype, "safe"):
            return result
        back = result.astype(values.dtype)
    if np.any(np.isfinite(values) & ~np.isfinite(back)):
        fix = "choose a number format of wider range"
        raise MaxlmError(f"values too large for {dtype.name}", where=where, fix=fix)
    if not lossy and np.any((back != values) & ~np.isnan(values)):
        message = f"its {values.dtype.name} values would be rounded to {dtype.name}"
        fix = "ask for that outright, or for a format that holds them"
        fix = "save the model as float32 first" if values.dtype == np.float64 else fix
        raise MaxlmError(message, where=where, fix=fix)
    return result


def split_into_slabs(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields ``values`` in C order as contiguous pieces along axis 0, views where they
    can be."""
    rows = values if values.ndim else values[None]
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
    # One row at least, and rows of no bytes count as one.
    rows_per_slab = max(1, SLAB_BYTES // max(1, row_bytes))
    for start in range(0, len(rows), rows_per_slab):
        yield np.ascontiguousarray(rows[start : start + rows_per_slab])


def _split_into_shards(
    tensors: Mapping[str, Kind], shard_bytes: int
) -> list[list[StoredTensor]]:
    """Splits tensors into files in their order; paths and offsets are still to be
    set."""
    shards: list[list[StoredTensor]] = [[]]
    bytes_in_shard = 0
    for name, (dtype, shape) in tensors.items():
        stored = StoredTensor(name, Path(), dtype, tuple(shape), offset=0)
        is_full = bytes_in_shard + stored.nbytes > shard_bytes
        if shards[-1] and is_full:  # an empty one takes any tensor
            shards.append([])
            bytes_in_shard = 0
        shards[-1].append(stored)
        bytes_in_shard += stored.nbytes
    return shards


def _place_tensors(
    path: Path, tensors: list[StoredTensor]
) -> tuple[bytes, list[StoredTensor]]:
    """Returns a file's header, padded to 8 bytes, and its tensors in their places, wide
    formats first: all lie aligned."""
    tensors = sorted(tensors, key=lambda stored: -NUMPY[stored.dtype].itemsize)
    # One after the other: each begins where the one before it ends. Offsets in the
    # header count from its end.
    bounds = list(accumulate((stored.nbytes for stored in tensors), initial=0))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for stored, start_and_end in zip(tensors, pairwise(bounds), strict=True):
        entries[stored.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": start_and_end,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed = [
        replace(stored, path=path, offset=len(header) + start)
        for stored, start in zip(tensors, bounds[:-1], strict=True)
    ]
    return header, placed
