"""Files of columns that jobs pass on: Arrow IPC, memory-mapped, complete or not there at all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.runtime.files import replacing, writing

Column = np.ndarray | pa.Array


def write_columns(path: Path, columns: Mapping[str, Column]) -> None:
    """Write columns of one length; the file appears when complete.

    Args:
        columns: Arrow arrays, or numpy arrays [rows] of numbers or fixed-length bytes.

    Raises:
        MaxlmError: the disk is full, or the folder can't be written.
    """
    arrays = [_to_arrow(column) for column in columns.values()]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as new,
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


@contextmanager
def open_columns(path: Path) -> Iterator["Columns"]:
    """The columns of a file, read when they are looked at; arrays stay valid after the context."""
    with pa.memory_map(str(path)) as source:
        yield Columns(pa.ipc.open_file(source).get_batch(0))


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


def ranges(number: int) -> np.ndarray:
    """Where each of `number` equal ranges of 64-bit hashes begins: uint64 [number]."""
    return np.array([i * 2**64 // number for i in range(number)], np.uint64)


def cut(values: np.ndarray, starts: np.ndarray, number: int) -> slice:
    """The part of sorted `values` that lies in a range: from starts[number] up to the next."""
    first = np.searchsorted(values, starts[number]) if number else 0
    last = np.searchsorted(values, starts[number + 1]) if number + 1 < len(starts) else None
    return slice(int(first), len(values) if last is None else int(last))


def first_of_runs(values: np.ndarray) -> np.ndarray:
    """Where sorted values change: bool [len(values)], true at the first of each run."""
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return first


def concatenate(parts: Sequence[np.ndarray], kind: type | str) -> np.ndarray:
    """The parts one after another; of no parts, an empty array of that kind."""
    return np.concatenate([np.empty(0, kind), *parts]) if parts else np.empty(0, kind)
