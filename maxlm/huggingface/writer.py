"""Writing a folder of safetensors files, a tensor at a time and in any order.

Shapes and formats are known beforehand, so each file begins with its final header and every tensor
goes straight to its place. Files have other names until all are complete.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.dtypes import NUMPY, cast_values, split_into_slabs
from maxlm.huggingface.files import INDEX, SINGLE, StoredTensor

SHARD_BYTES = 5_000_000_000
"""As large as published files are."""
PARTIAL = ".maxlm-partial"
"""Ends the names of files that are not complete, and of scratch."""


Kind = tuple[str, tuple[int, ...]]
"""A dtype as safetensors names it, and a shape."""


class SafetensorsWriter:
    """A folder of safetensors files in the making; a context manager.

    Leaving it without :meth:`commit` leaves nothing behind.

    Args:
        tensors: dtype (as safetensors names it) and shape of each, by name.
        shard_bytes: the most that a file holds, unless one tensor is larger.
        overwrite: replace the model in a folder that is not empty; other files stay.

    Raises:
        MaxlmError: the folder is not empty and not ``overwrite``, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, Kind],
        shard_bytes: int = SHARD_BYTES,
        *,
        overwrite: bool = False,
    ):
        self.folder = Path(folder)
        if not overwrite:
            check_empty_folder(self.folder)
        self._shards = _shards(tensors, shard_bytes)
        self._places = {t.name: t for _, shard in self._shards.values() for t in shard}
        self._left = set(tensors)
        self._files: dict[str, int] = {}
        self._made_folder = not self.folder.exists()

    def __enter__(self) -> "SafetensorsWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"*{PARTIAL}"):  # by a writer that was killed
                left.unlink()
            for name, (header, tensors) in self._shards.items():
                mode = os.O_RDWR | os.O_CREAT | os.O_TRUNC
                file = self._files[name] = os.open(self._partial(name), mode, 0o666)
                os.pwrite(file, header, 0)
                os.ftruncate(file, len(header) + sum(stored.nbytes for stored in tensors))
        except OSError as error:
            self._abandon()
            raise self._failed(error) from error
        return self

    def write(self, name: str, values: np.ndarray, *, lossy: bool = False) -> None:
        """One tensor, cast to the format it was announced with.

        Raises:
            MaxlmError: another shape than announced, a cast that would change values and not
                ``lossy``, or a full disk.
        """
        stored = self._places[name]
        if values.shape != stored.shape:
            what = f"is {list(values.shape)} in the checkpoint, not {list(stored.shape)}"
            raise MaxlmError(what, where=name, fix="use the config it was trained with")
        dtype, offset = NUMPY[stored.dtype], stored.offset
        file = self._files[stored.path.name]
        try:
            for slab in split_into_slabs(values):
                data = cast_values(slab, dtype, where=name, lossy=lossy)
                offset += _write_all(file, data, offset)
        except OSError as error:
            raise self._failed(error) from error
        self._left.discard(name)

    def commit(self) -> None:
        """Give the files their names, the index last; to be called once, when all is written."""
        assert not self._left, f"not written: {min(self._left)}"
        try:
            for file in self._files.values():
                os.fsync(file)
            (self.folder / INDEX).unlink(missing_ok=True)
            for name in self._shards:
                os.replace(self._partial(name), self.folder / name)
            for old in (*self.folder.glob("model-*-of-*.safetensors"), self.folder / SINGLE):
                if old.name not in self._shards:
                    old.unlink(missing_ok=True)
            if len(self._shards) > 1:
                partial = self._partial(INDEX)
                partial.write_text(json.dumps(self._index(), indent=2) + "\n")
                os.replace(partial, self.folder / INDEX)
        except OSError as error:
            raise self._failed(error) from error
        self._made_folder = False

    def __exit__(self, *_: object) -> None:
        self._abandon()

    def _index(self) -> dict[str, object]:
        files = {stored.name: stored.path.name for stored in self._places.values()}
        total = sum(stored.nbytes for stored in self._places.values())
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}{PARTIAL}"

    def _abandon(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}
        for name in (*self._shards, INDEX):
            with suppress(OSError):
                self._partial(name).unlink()
        if self._made_folder:
            with suppress(OSError):
                self.folder.rmdir()  # unless somebody else put something there

    def _failed(self, error: OSError) -> MaxlmError:
        what = f"safetensors cannot be written ({error.strerror or error})"
        return MaxlmError(what, where=str(self.folder), fix="free some space or rights, run again")


def check_empty_folder(folder: Path) -> None:
    """Refuse a folder in which something lies already, other than leftovers of a killed writer.

    Raises:
        MaxlmError: it does.
    """
    if folder.exists() and not folder.is_dir():
        raise MaxlmError("a file, not a folder", where=str(folder), fix="choose another name")
    if folder.exists() and any(not path.name.endswith(PARTIAL) for path in folder.iterdir()):
        fix = "choose another, or ask for it to be overwritten"
        raise MaxlmError("the folder is not empty", where=str(folder), fix=fix)


def _shards(
    tensors: Mapping[str, Kind], shard_bytes: int
) -> dict[str, tuple[bytes, list[StoredTensor]]]:
    """Returns the header and the tensors of each file, by its name."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        stored = StoredTensor(name, Path(), dtype, tuple(shape), 0)
        if shards[-1] and filled + stored.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += stored.nbytes
    total = len(shards)
    if total == 1:
        return {SINGLE: _placed(SINGLE, shards[0])}
    names = (f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1))
    return {name: _placed(name, shard) for name, shard in zip(names, shards, strict=True)}


def _placed(file: str, tensors: list[StoredTensor]) -> tuple[bytes, list[StoredTensor]]:
    """A file's header, padded to 8 bytes, and its tensors, wide formats first: all lie aligned."""
    tensors = sorted(tensors, key=lambda stored: -NUMPY[stored.dtype].itemsize)
    ends = list(accumulate((stored.nbytes for stored in tensors), initial=0))
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for stored, offsets in zip(tensors, pairwise(ends), strict=True):
        shape = list(stored.shape)
        head[stored.name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [
        replace(stored, path=Path(file), offset=len(header) + start)
        for stored, start in zip(tensors, ends, strict=False)
    ]


def _write_all(file: int, data: np.ndarray, offset: int) -> int:
    left = data.reshape(-1).view(np.uint8).data
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count
    return data.nbytes
