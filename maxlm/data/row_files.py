"""Files of rows, each a dictionary: JSON Lines, Parquet, datasets saved to disk."""

import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.documents.streams import COMPRESSIONS, import_pyarrow, open_stream
from maxlm.data.row_forms import check_columns_exist, convert_row
from maxlm.runtime.json_files import read_json_object

if TYPE_CHECKING:
    import pyarrow

_FIX = "name a .jsonl (.gz, .zst) or .parquet file, or a dataset's folder"


class _Rows(Protocol):
    """The rows of one file by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


# Rows of the files that this process reads.
_OPENED: dict[Path, _Rows] = {}

# Rows of each file in which a column that is renamed is looked for.
_ROWS_WITH_COLUMNS = 1000


@dataclass(frozen=True)
class RowFiles:
    """The rows of some files by number, one file after the other, in the forms that
    tasks read (:mod:`maxlm.data.row_forms`); small to pickle."""

    paths: tuple[Path, ...]
    starts: tuple[int, ...]
    """Number of each file's first row, and of all rows."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns in the files by the names that tasks read."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        path, row_in_file = self._find(index)
        if path not in _OPENED:  # a worker process, which gets the paths alone
            _OPENED[path] = _open_file(path)
        row = _OPENED[path][row_in_file]
        try:
            return convert_row(row, self.columns)
        except MaxlmError as error:
            where = self.locate(index)
            raise MaxlmError(error.message, where=where, fix=error.fix) from error

    def locate(self, index: int) -> str:
        """Returns the file and the place in it of a row, counted from 0, for
        messages."""
        path, row_in_file = self._find(index)
        return f"{path}: row {row_in_file}"

    def _find(self, index: int) -> tuple[Path, int]:
        """The file of a row, and the row's number in it."""
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.paths[file], index - self.starts[file]


def open_rows(*paths: str | Path, columns: Mapping[str, str] | None = None) -> RowFiles:
    """Opens files of rows: ``.jsonl`` and ``.json``, also compressed (``.gz``,
    ``.zst``), ``.parquet``, ``.arrow`` streams, and folders that Hugging Face's
    ``datasets`` saved. Raises MaxlmError: a file that is missing, empty or none of
    these, or one without a column that ``columns`` (names in the files by the names
    that tasks read) names."""
    columns = columns or {}
    files = tuple(map(Path, paths))
    starts = [0]
    for file in files:
        # Also where it is open: it may have been written anew.
        _OPENED[file] = _open_file(file)
        starts.append(starts[-1] + len(_OPENED[file]))
    if columns:
        for file in files:
            check_columns_exist(_list_first_rows(_OPENED[file]), columns, str(file))
    return RowFiles(files, tuple(starts), columns)


def _list_first_rows(rows: _Rows) -> list[dict[str, Any]]:
    """The first rows that can be read; what is wrong with others is said when they are
    read."""
    readable = []
    for index in range(min(len(rows), _ROWS_WITH_COLUMNS)):
        with suppress(MaxlmError):
            readable.append(rows[index])
    return readable


class _JsonLines:
    """Lines that are JSON objects; empty ones are passed over."""

    def __init__(self, path: Path, data: bytes | mmap.mmap):
        self._path = path
        self._data = data
        lines = re.finditer(rb"[^\n]*\S[^\n]*", data)
        pair = np.dtype((np.int64, 2))
        self._spans = np.fromiter((line.span() for line in lines), pair)
        """Where each line begins and ends: int64 [rows, 2]."""

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = self._spans[index]
        message = "no JSON object"
        try:
            row = json.loads(self._data[start:stop])
            if isinstance(row, dict):
                return row
        except (ValueError, RecursionError) as error:
            message = f"no JSON object ({error})"
        fix = "write one object on each line"
        raise MaxlmError(message, where=f"{self._path}: row {index}", fix=fix)


class _ArrowRows:
    """Rows of an Arrow table, without the nulls within their structs: a struct has
    every field that any row's has, so that null there means that the row says
    nothing."""

    def __init__(self, table: "pyarrow.Table"):
        self._table = table
        self._nested = [
            column.name for column in table.schema if _has_struct(column.type)
        ]

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table.slice(index, 1).to_pylist()[0]
        return row | {name: _drop_nested_nulls(row[name]) for name in self._nested}


def _has_struct(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type are structs, or hold some."""
    if str(kind).startswith("struct"):
        return True
    children = [kind.field(i).type for i in range(kind.num_fields)]
    return any(_has_struct(child) for child in children)


def _drop_nested_nulls(value: object) -> object:
    if isinstance(value, list):
        return [_drop_nested_nulls(item) for item in value]
    if isinstance(value, dict):
        return {
            name: _drop_nested_nulls(child)
            for name, child in value.items()
            if child is not None
        }
    return value


def _open_file(path: Path) -> _Rows:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if path.is_dir():
        rows = _open_arrow(_list_arrow_files(path))
    elif not path.is_file():
        raise MaxlmError("no such file", where=str(path), fix=_FIX)
    elif suffix in (".parquet", ".arrow") and not compression:
        rows = _open_arrow([path])
    elif suffix not in (".jsonl", ".json"):
        raise MaxlmError("no file of rows", where=str(path), fix=_FIX)
    elif compression:
        with open_stream(path, compression) as stream:
            rows = _JsonLines(path, stream.read())
    else:
        rows = _JsonLines(path, _map_file(path))
    if not len(rows):
        raise MaxlmError("the file has no rows", where=str(path), fix="give it some")
    return rows


def _map_file(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which mmap refuses
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _list_arrow_files(folder: Path) -> list[Path]:
    """The files of a dataset that ``save_to_disk`` wrote."""
    splits = folder / "dataset_dict.json"
    state = folder / "state.json"
    if splits.exists():
        names = read_json_object(splits, _FIX).get("splits")
        listed = ", ".join(map(str, names)) if isinstance(names, list) else "unknown"
        message = f"a dataset with the splits {listed}"
        raise MaxlmError(message, where=str(folder), fix="name one of their folders")
    if not state.exists():
        raise MaxlmError("no saved dataset in this folder", where=str(folder), fix=_FIX)
    names = _get_data_file_names(read_json_object(state, _FIX))
    if not names:
        message = "no saved dataset in this folder: its _data_files name no files here"
        raise MaxlmError(message, where=str(state), fix=_FIX)
    return [folder / name for name in names]


def _get_data_file_names(state: Mapping[str, Any]) -> list[str]:
    """The file names in a dataset's state.json; none if one of them is not a plain
    name. The folder is the whole of a dataset: a name elsewhere is refused, as of a
    checkpoint's."""
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        return []
    names = []
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name != Path(name).name:
            return []
        names.append(name)
    return names


def _open_arrow(paths: Sequence[Path]) -> _ArrowRows:
    pa = import_pyarrow(paths[0])
    tables = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                tables.append(pa.parquet.read_table(path, memory_map=True))
            else:
                tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            message = f"cannot be read: {error}"
            fix = "write the file again"
            raise MaxlmError(message, where=str(path), fix=fix) from error
    return _ArrowRows(pa.concat_tables(tables))
