"""Batches from rows of dictionaries: prompts with answers, chosen and rejected ones, messages.

Rows are encoded, padded, or packed several into one, and shuffled anew each epoch. Which examples a
row has is a function of the seed alone, and where it stands of the seed and the epoch, so that any
row of any batch is found in O(1).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.documents.streams import make_missing_package_error
from maxlm.data.loader.batches import Batch
from maxlm.data.loader.packing import pack_best_fit
from maxlm.data.loader.permutation import derive_key, derive_keys, permute

Encode = Callable[[dict[str, Any]], Mapping[str, Any]]
"""A row of a file to arrays by name; pure, and pickles. Along "seq" an array is as long as the
example, at most a row's length."""

# Examples that are packed together.
PACKING_BLOCK = 16384


@dataclass(frozen=True)
class JsonlRows:
    """Lines that are JSON objects; empty ones are passed over."""

    path: Path
    starts: NDArray[np.int64] = field(repr=False)
    """Offsets at which rows begin, in bytes [rows]."""

    def __len__(self) -> int:
        return self.starts.size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.readline()
        try:
            if isinstance(row := json.loads(line), dict):
                return row
        except ValueError:
            pass
        what = f"row {index} is no JSON object"
        raise MaxlmError(what, where=str(self.path), fix="repair the line")


@dataclass(frozen=True)
class ParquetRows:
    """Rows of a Parquet file, of which a row group is read at once."""

    path: Path

    @cached_property
    def _group_starts(self) -> NDArray[np.int64]:
        metadata = _open_parquet(self.path).metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        table = _read_group(self.path, group)
        return table.slice(index - int(self._group_starts[group]), 1).to_pylist()[0]


RowFile = JsonlRows | ParquetRows
"""Rows by number; small to pickle."""


@lru_cache(maxsize=16)
def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise make_missing_package_error(path) from error
    return ParquetFile(path)


@lru_cache(maxsize=16)
def _read_group(path: Path, group: int) -> Any:
    return _open_parquet(path).read_row_group(group)


def open_rows(path: str | Path) -> RowFile:
    """Open a file of rows, by its name's ending: ``.jsonl``, ``.json`` or ``.parquet``."""
    path = Path(path)
    if not path.is_file():
        raise MaxlmError("no such file", where=str(path), fix="name a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        rows: RowFile = ParquetRows(path)
    elif path.suffix in (".jsonl", ".json"):
        starts, at = [], 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                at += len(line)
        rows = JsonlRows(path, np.array(starts, np.int64))
    else:
        raise MaxlmError("no file of rows", where=str(path), fix="name a .jsonl or .parquet file")
    if not len(rows):
        raise MaxlmError("the file has no rows", where=str(path), fix="give it some")
    return rows


@dataclass(frozen=True)
class RowSource:
    """A batch source of rows; see :func:`make_row_source`."""

    file: RowFile
    encode: Encode
    arrays: Mapping[str, BatchArraySpec]
    batch_size: int
    shuffle_key: int | None
    """Key of the shuffling; None keeps the file's order."""
    example_indices: NDArray[np.int64]
    """The examples of all rows, one row after the other."""
    row_offsets: NDArray[np.int64]
    """Row i has examples [offsets[i], offsets[i + 1])."""
    endless: bool = True
    """False reads the file once; rows past its end are padding."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.row_offsets.size - 1

    @property
    def num_steps(self) -> int | None:
        return None if self.endless else -(-self.rows_per_epoch // self.batch_size)

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Batch:
        indices = step * self.batch_size + np.asarray(row_numbers, np.int64)
        epochs, places = np.divmod(indices, self.rows_per_epoch)
        present = np.ones(len(indices), bool) if self.endless else epochs == 0
        if self.shuffle_key is not None:
            places = permute(places, self.rows_per_epoch, derive_keys(self.shuffle_key, epochs))
        batch = {
            name: np.zeros((len(indices), *array.shape), array.dtype)
            for name, array in self.arrays.items()
        }
        for i in np.flatnonzero(present).tolist():
            own = slice(*self.row_offsets[places[i] : places[i] + 2])
            self._fill(batch, i, self.example_indices[own].tolist())
        return batch

    def _fill(self, batch: Batch, i: int, examples: Sequence[int]) -> None:
        """Write examples into row i, which is zeros, one after the other."""
        start = 0
        for number, example in enumerate(examples, 1):
            encoded = self.encode(self.file[example])
            length = _measure(encoded, self.arrays, f"{self.file.path}: row {example}")
            for name, array in self.arrays.items():
                prefix = name.removesuffix("segment_ids").removesuffix("positions")
                if name in encoded:
                    value = np.asarray(encoded[name])
                elif prefix != name:
                    size = len(encoded[f"{prefix}tokens"])
                    value = np.arange(size)
                    value = np.full_like(value, number) if name.endswith("segment_ids") else value
                else:
                    continue
                place = (
                    slice(start, start + size) if axis == "seq" else slice(None)
                    for axis, size in zip(array.axes, value.shape, strict=True)
                )
                batch[name][(i, *place)] = value
            start += length


def _measure(encoded: Mapping[str, Any], arrays: Mapping[str, BatchArraySpec], where: str) -> int:
    """Return the tokens of an encoded example: those of its longest array along "seq"."""
    along = {name: array.axes.index("seq") for name, array in arrays.items() if "seq" in array.axes}
    length = max(np.shape(encoded[name])[axis] for name, axis in along.items() if name in encoded)
    if length > (room := _room(arrays)):
        what = f"an example of {length} tokens, where a row of a batch has {room}"
        fix = "raise data.seq_len, or let the task cut its examples"
        raise MaxlmError(what, where=where, fix=fix)
    return length


def _room(arrays: Mapping[str, BatchArraySpec]) -> int:
    """The tokens of a row."""
    return min(a.shape[a.axes.index("seq")] for a in arrays.values() if "seq" in a.axes)


def make_row_source(
    file: RowFile,
    encode: Encode,
    arrays: Mapping[str, BatchArraySpec],
    batch_size: int,
    *,
    seed: int,
    packed: bool = False,
    shuffle: bool = True,
    endless: bool = True,
) -> RowSource:
    """Makes a batch source of a file's rows, each example exactly once an epoch.

    Args:
        arrays: a row's, which ``encode`` fills, but for those whose names end in ``segment_ids``
            and ``positions``: where it leaves them out, they number the examples of a row from 1
            and the ``tokens`` of each (under the same prefix) from 0. Zeros pad all else.
        packed: several examples share a row, each in the fullest row that has room for it
            (best-fit decreasing). Every example is encoded once beforehand, for its length.
        shuffle: False keeps the file's order.
        endless: False reads the file once.
    """
    key = derive_key(seed, "rows") if shuffle else None
    examples = np.arange(len(file), dtype=np.int64)
    offsets = np.arange(len(file) + 1, dtype=np.int64)
    if packed:
        if key is not None:
            examples = permute(examples, len(file), derive_key(seed, "packing"))
        examples, offsets = _pack(file, encode, arrays, examples)
    return RowSource(file, encode, arrays, batch_size, key, examples, offsets, endless)


def _pack(
    file: RowFile, encode: Encode, arrays: Mapping[str, BatchArraySpec], examples: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Examples in order of their rows, and where each row's begin."""
    where, numbers = f"{file.path}: row", examples.tolist()
    lengths = np.array([_measure(encode(file[i]), arrays, f"{where} {i}") for i in numbers])
    order, counts = [], []
    for start in range(0, len(examples), PACKING_BLOCK):
        block = slice(start, start + PACKING_BLOCK)
        rows = pack_best_fit(lengths[block], _room(arrays))
        order.append(examples[block][np.argsort(rows, kind="stable")])
        counts.append(np.bincount(rows))
    return np.concatenate(order), np.cumsum([0, *np.concatenate(counts)])
