"""Reading a folder of safetensors files, a tensor at a time.

The safetensors library checks each header (lengths, offsets, holes, shapes); the bytes are read
here, because into NumPy it has no float8 and cannot cast on the way. Nothing is unpickled.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.dtypes import NUMPY, SLAB_BYTES, cast_values

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    path: Path
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * NUMPY[self.dtype].itemsize


def list_stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Returns all tensors of model.safetensors, or of the shards that its index names; reads only
    headers.

    Raises:
        MaxlmError: no such files, only pickled ones, a damaged file, an index that does not agree
            with its files, a tensor in two of them, or a number format that NumPy does not have.
    """
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        fix = "remove the one that does not belong"
        raise MaxlmError(f"both {SINGLE} and {INDEX}", where=str(folder), fix=fix)
    if single.exists():
        return {stored.name: stored for stored in _header(single)}
    if index.exists():
        return _indexed(folder, _weight_map(index))
    raise _nothing_to_read(folder)


def read_tensor(
    stored: StoredTensor, dtype: np.dtype | None = None, *, lossy: bool = False
) -> np.ndarray:
    """Returns a tensor's values, in its own number format or cast on the way to ``dtype``.

    Raises:
        MaxlmError: the file cannot be read, or casting would change values and not ``lossy``.
    """
    values = np.empty(stored.shape, dtype or NUMPY[stored.dtype])
    flat, done = values.reshape(-1), 0
    for piece in iterate_pieces(stored):
        flat[done : done + len(piece)] = cast_values(
            piece, flat.dtype, where=stored.name, lossy=lossy
        )
        done += len(piece)
    return values


def iterate_pieces(stored: StoredTensor) -> Iterator[np.ndarray]:
    """Yields a tensor's values in order, as 1-D arrays that are only valid until the next."""
    dtype = NUMPY[stored.dtype]
    buffer = np.empty(min(stored.size, SLAB_BYTES // dtype.itemsize), dtype)
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            for start in range(0, stored.size, max(1, len(buffer))):
                piece = buffer[: stored.size - start]
                if file.readinto(piece.view(np.uint8).data) != piece.nbytes:
                    raise OSError(f"it ends within {stored.name}")
                yield piece
    except OSError as error:
        raise MaxlmError(f"cannot be read ({error})", where=str(stored.path), fix=_AGAIN) from error


def _header(path: Path) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = file.offset_keys()
            slices = {name: file.get_slice(name) for name in names}
            kinds = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        with path.open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
    except (SafetensorError, OSError) as error:
        what = f"no complete safetensors file ({_first_words(error)})"
        raise MaxlmError(what, where=str(path), fix=_AGAIN) from error
    tensors = []
    for name in names:  # One after the other without holes: the library has checked that.
        dtype, shape = kinds[name]
        if dtype not in NUMPY:
            fix = f"use a version stored as one of {', '.join(NUMPY)}"
            raise MaxlmError(f"{name} is stored as {dtype}", where=str(path), fix=fix)
        tensors.append(StoredTensor(name, path, dtype, shape, offset))
        offset += tensors[-1].nbytes
    return tensors


def _first_words(error: Exception) -> str:
    text = str(error).removeprefix("Error while deserializing header: ")
    return text.splitlines()[0][:100] if text else type(error).__name__


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        ok = all(isinstance(file, str) for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ok, weight_map = False, {}
    if not ok:
        what = "no index of safetensors files (a JSON object with a weight_map)"
        raise MaxlmError(what, where=str(index), fix=_AGAIN)
    return weight_map


def _indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    index = str(folder / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            fix = "keep the files beside their index"
            raise MaxlmError(f"names {file!r}, which is no file here", where=index, fix=fix)
        if not (folder / file).exists():
            raise MaxlmError(f"names {file}, which is missing", where=index, fix=_AGAIN)
        for stored in _header(folder / file):
            if other := tensors.get(stored.name):
                what = f"{stored.name} is in two files, {other.path.name} and {file}"
                raise MaxlmError(what, where=str(folder), fix=_AGAIN)
            tensors[stored.name] = stored
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            what = f"says that {name} is in {file}, which lacks it"
            raise MaxlmError(what, where=index, fix=_AGAIN)
    return tensors


def _nothing_to_read(folder: Path) -> MaxlmError:
    where, files = str(folder), []
    if not folder.is_dir():
        return MaxlmError("no folder here", where=where, fix="name one with safetensors files")
    files = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in files):
        what = f"safetensors files, but neither {SINGLE} nor {INDEX}"
        return MaxlmError(what, where=where, fix="fetch the index, or rename a lone file")
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        what = f"{pickles[0]} is a pickle, which can run any code when it is read"
        fix = (
            "fetch the model as safetensors; or, only if you trust it, load it with transformers "
            "(from_pretrained) and write it with save_pretrained"
        )
        return MaxlmError(what, where=where, fix=fix)
    return MaxlmError(f"no {SINGLE} here", where=where, fix="name a folder with safetensors files")
