"""Files of columns that jobs pass on: Arrow IPC, memory-mapped, complete or not there
at all."""

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
    """Write columns of one length; the file appears when complete. `columns`: Arrow
    arrays, or numpy arrays [rows] of numbers."""
    batch = pa.RecordBatch.from_pydict(dict(columns))
    with convert_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(path) as new,
        pa.OSFile(str(new), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as out,
    ):
        out.write_batch(batch)


def map_columns(path: Path) -> pa.RecordBatch:
    """Maps the columns of a file into memory: they are read when they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Reads the columns of a file of numbers, not copied: when they are looked at."""
    batch = map_columns(path)
    return {
        name: column.to_numpy()
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def count_ranges(num_items: int, item_bytes: int, memory: int) -> int:
    """Counts the ranges into which items are divided, so that those of one range take
    about `memory` bytes at most; at least one."""
    num_ranges = -(-num_items * item_bytes // memory)  # Rounded up.
    return max(1, num_ranges)


def make_equal_range_starts(num_ranges: int) -> np.ndarray:
    """Returns where equal ranges of numbers of 64 bits begin: uint64 [num_ranges]."""
    return np.array([i * 2**64 // num_ranges for i in range(num_ranges)], np.uint64)


def read_range(
    paths: Sequence[Path],
    names: Sequence[str],
    range_starts: np.ndarray,
    range_index: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Reads the rows of files, sorted by the first of the columns `names`, a uint64, in
    which that lies from range_starts[range_index] up to the next start. Returns the
    columns of all files end to end, and the index of each row's file: uint64 [rows]."""
    # Where the range starts, and where it stops; the last range has no next start, and
    # ends with each file.
    bounds = range_starts[range_index : range_index + 2]
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in names}
    sizes = []
    for path in paths:
        columns = read_columns(path)
        sorted_keys = columns[names[0]]
        start, *stops = np.searchsorted(sorted_keys, bounds).tolist()
        stop = stops[0] if stops else len(sorted_keys)
        for name in names:
            pieces[name].append(columns[name][start:stop])
        sizes.append(stop - start)
    if not paths:  # Nothing cannot be concatenated.
        pieces = {name: [np.empty(0, np.uint64)] for name in names}
    columns = {name: np.concatenate(parts) for name, parts in pieces.items()}
    file_indices = np.repeat(np.arange(len(paths), dtype=np.uint64), sizes)
    return columns, file_indices


def mark_run_starts(values: np.ndarray) -> np.ndarray:
    """Marks where sorted values change: bool [len(values)], true at the first of each
    run."""
    is_start = np.append(True, values[1:] != values[:-1])
    return is_start[: len(values)]  # Of no values there is no first one either.
