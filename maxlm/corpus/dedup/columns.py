"""Files of columns that jobs pass on: Arrow IPC, memory-mapped, complete or not there at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.runtime.files import convert_write_errors, replace_file

Column = np.ndarray | pa.Array


def get_shard_path(scratch: Path, kind: str, shard: str) -> Path:
    """Returns the file with columns of one kind, such as "members", of a shard."""
    return scratch / kind / f"{shard}.arrow"


def write_columns(path: Path, columns: Mapping[str, Column]) -> None:
    """Write columns of one length; the file appears when complete.

    Args:
        columns: Arrow arrays, or numpy arrays [rows] of numbers.
    """
    batch = pa.RecordBatch.from_pydict(dict(columns))
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(path) as new,
        pa.OSFile(str(new), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as out,
    ):
        out.write_batch(batch)


def read_batch(path: Path) -> pa.RecordBatch:
    """The columns of a file, read when they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file of numbers, not copied, read when they are looked at."""
    batch = read_batch(path)
    return {name: column.to_numpy() for name, column in zip(batch.schema.names, batch, strict=True)}


def find_range(values: np.ndarray, range_starts: np.ndarray, range_index: int) -> slice:
    """Finds the part of sorted `values` from range_starts[range_index] up to the next start."""
    ends = np.append(np.searchsorted(values, range_starts), len(values))
    return slice(*ends[range_index : range_index + 2].tolist())


def read_range(
    paths: Sequence[Path], key: str, names: Sequence[str], num_ranges: int, range_index: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reads the rows of files, sorted by a column of hashes, in one of equal ranges of these.

    Returns:
        The columns `key` and `names` of all files end to end, and the index of each row's file:
        uint64 [rows].
    """
    starts = np.array([i * 2**64 // num_ranges for i in range(num_ranges)], np.uint64)
    files = [read_columns(path) for path in paths]
    parts = [find_range(columns[key], starts, range_index) for columns in files]
    sizes = [part.stop - part.start for part in parts]
    found = {
        name: np.concatenate([each[name][part] for each, part in zip(files, parts, strict=True)])
        for name in (key, *names)
    }
    return found, np.repeat(np.arange(len(paths), dtype=np.uint64), sizes)


def mark_run_starts(values: np.ndarray) -> np.ndarray:
    """Marks where sorted values change: bool [len(values)], true at the first of each run."""
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return first
