"""Files of columns that jobs pass on: Arrow IPC, memory-mapped, complete or not there at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.runtime.files import convert_write_errors, replace_file

Column = np.ndarray | pa.Array


def write_columns(path: Path, columns: Mapping[str, Column]) -> None:
    """Write columns of one length; the file appears when complete.

    Args:
        columns: Arrow arrays, or numpy arrays [rows] of numbers or fixed-length bytes.
    """
    arrays = [_to_arrow(column) for column in columns.values()]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(path) as new,
        pa.OSFile(str(new), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as out,
    ):
        out.write_batch(batch)


def _to_arrow(column: Column) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    if column.dtype.kind == "S":
        data = pa.py_buffer(np.ascontiguousarray(column))
        return pa.Array.from_buffers(pa.binary(column.dtype.itemsize), len(column), [None, data])
    return pa.array(column)


def read_columns(path: Path) -> "Columns":
    """The columns of a file, read when they are looked at."""
    return Columns(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))


class Columns:
    """Columns by name."""

    def __init__(self, batch: pa.RecordBatch):
        self._batch = batch

    def __len__(self) -> int:
        return self._batch.num_rows

    def array(self, name: str) -> pa.Array:
        return self._batch.column(name)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column of numbers or fixed-length bytes, not copied."""
        array = self._batch.column(name)
        if pa.types.is_fixed_size_binary(array.type):
            kind = f"S{array.type.byte_width}"
            return np.frombuffer(array.buffers()[1] or b"", kind, count=len(array))
        return array.to_numpy(zero_copy_only=not pa.types.is_boolean(array.type))


def hash_range_starts(num_ranges: int) -> np.ndarray:
    """Computes where equal ranges of 64-bit hashes begin: uint64 [num_ranges]."""
    return np.array([i * 2**64 // num_ranges for i in range(num_ranges)], np.uint64)


def find_range(values: np.ndarray, range_starts: np.ndarray, range_index: int) -> slice:
    """Finds the part of sorted `values` from range_starts[range_index] up to the next start."""
    first = np.searchsorted(values, range_starts[range_index]) if range_index else 0
    if range_index + 1 == len(range_starts):
        return slice(int(first), len(values))
    return slice(int(first), int(np.searchsorted(values, range_starts[range_index + 1])))


def mark_run_starts(values: np.ndarray) -> np.ndarray:
    """Marks where sorted values change: bool [len(values)], true at the first of each run."""
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return first


def concatenate(parts: Sequence[np.ndarray], dtype: type | str) -> np.ndarray:
    """Joins the parts one after another; of no parts, an empty array of that kind."""
    return np.concatenate([np.empty(0, dtype), *parts]) if parts else np.empty(0, dtype)
