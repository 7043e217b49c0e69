"""Files of dictionaries, any of which is read alone: JSON Lines and Parquet."""

import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError


class RowFile(Protocol):
    """Rows by number; small to pickle."""

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class JsonlRows:
    """Lines that are JSON objects; empty ones are passed over."""

    path: Path
    starts: NDArray[np.int64] = field(repr=False)
    """Where each row begins, in bytes [rows]."""

    def __len__(self) -> int:
        return self.starts.size

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise MaxlmError(
                f"row {index} is no JSON object", where=str(self.path), fix="repair the line"
            )
        return row


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


@lru_cache(maxsize=16)
def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        fix = "pip install 'maxlm[data]'"
        raise MaxlmError("reading Parquet needs pyarrow", where=str(path), fix=fix) from error
    return ParquetFile(path)


@lru_cache(maxsize=16)
def _read_group(path: Path, group: int) -> Any:
    return _open_parquet(path).read_row_group(group)


def open_rows(path: str | Path) -> RowFile:
    """Open a file of rows, by its name's ending: ``.jsonl``, ``.json`` or ``.parquet``.

    Raises:
        MaxlmError: it is not there, is of another kind, or has no rows.
    """
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
