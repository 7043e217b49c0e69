"""Files of rows, each a dictionary: JSON Lines, Parquet, datasets saved to disk."""

import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.documents.streams import COMPRESSIONS, import_pyarrow, open_stream
from maxlm.data.row_forms import check_columns_exist, convert_row
from maxlm.runtime.json_files import read_json_object

_FIX = "name a .jsonl (.gz, .zst) or .parquet file, or a dataset's folder"

_OPENED: dict[Path, Any] = {}
"""Rows of the files that this process reads: `_JsonLines`, or `_ArrowRows`."""

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
        file, row = self._find(index)
        path = self.paths[file]
        if path not in _OPENED:
            _OPENED[path] = _read_file(path)
        content = _OPENED[path][row]
        try:
            return convert_row(content, self.columns)
        except MaxlmError as error:
            raise MaxlmError(
                error.what, where=self.locate(index), fix=error.fix
            ) from error

    def locate(self, index: int) -> str:
        """Returns the file and the place in it of a row, counted from 0, for
        messages."""
        file, row = self._find(index)
        return f"{self.paths[file]}: row {row}"

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return file, index - self.starts[file]


def open_rows(*paths: str | Path, columns: Mapping[str, str] | None = None) -> RowFiles:
    """Opens files of rows: ``.jsonl`` and ``.json``, also compressed (``.gz``,
    ``.zst``), ``.parquet``, ``.arrow`` streams, and folders that Hugging Face's
    ``datasets`` saved. Raises MaxlmError: a file that is missing, empty or none of
    these, or one without a column that ``columns`` (names in the files by the names
    that tasks read) names."""
    columns = columns or {}
    opened = [Path(path) for path in paths]
    _OPENED.update(
        (path, _read_file(path)) for path in opened
    )  # they may be written anew
    sizes = [len(_OPENED[path]) for path in opened]
    for path in opened if columns else ():
        check_columns_exist(_list_first_rows(_OPENED[path]), columns, str(path))
    return RowFiles(tuple(opened), tuple(np.cumsum([0, *sizes]).tolist()), columns)


def _list_first_rows(rows: Any) -> list[dict[str, Any]]:
    """The first rows that can be read; what is wrong with others is said when they are
    read."""
    readable = []
    for index in range(min(len(rows), _ROWS_WITH_COLUMNS)):
        with suppress(MaxlmError):
            readable.append(rows[index])
    return readable


class _JsonLines:
    """Lines that are JSON objects; empty ones are passed over."""

    def __init__(self, path: Path, data: Any):
        self._path, self._data = path, data
        spans = (found.span() for found in re.finditer(rb"[^\n]*\S[^\n]*", data))
        self._spans = np.fromiter(spans, np.dtype((np.int64, 2)))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        fault = ""
        try:
            row = json.loads(self._data[slice(*self._spans[index])])
            if isinstance(row, dict):
                return row
        except (ValueError, RecursionError) as error:
            fault = f" ({error})"
        what = f"no JSON object{fault}"
        fix = "write one object on each line"
        raise MaxlmError(what, where=f"{self._path}: row {index}", fix=fix)


class _ArrowRows:
    """Rows of an Arrow table, without the nulls within their structs: a struct has
    every field that any row's has, so that null there means that the row says
    nothing."""

    def __init__(self, table: Any):
        self._table = table
        fields = table.schema
        self._nested = [f.name for f in fields if _has_struct(f.type)]

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table.slice(index, 1).to_pylist()[0]
        return row | {name: _drop_nested_nulls(row[name]) for name in self._nested}


def _has_struct(kind: Any) -> bool:
    children = [kind.field(i).type for i in range(kind.num_fields)]
    return str(kind).startswith("struct") or any(
        _has_struct(child) for child in children
    )


def _drop_nested_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_nested_nulls(item) for item in value]
    if isinstance(value, dict):
        return {k: _drop_nested_nulls(v) for k, v in value.items() if v is not None}
    return value


def _read_file(path: Path) -> Any:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2 if packed else -1] if len(suffixes) > bool(packed) else ""
    if path.is_dir():
        rows = _read_arrow(_list_arrow_files(path))
    elif not path.is_file():
        raise MaxlmError("no such file", where=str(path), fix=_FIX)
    elif kind in (".parquet", ".arrow") and not packed:
        rows = _read_arrow([path])
    elif kind not in (".jsonl", ".json"):
        raise MaxlmError("no file of rows", where=str(path), fix=_FIX)
    elif packed:
        with open_stream(path, packed) as stream:
            rows = _JsonLines(path, stream.read())
    else:
        with path.open("rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            read = mmap.ACCESS_READ
            rows = _JsonLines(
                path, b"" if empty else mmap.mmap(file.fileno(), 0, access=read)
            )
    if not len(rows):
        raise MaxlmError("the file has no rows", where=str(path), fix="give it some")
    return rows


def _list_arrow_files(folder: Path) -> list[Path]:
    """The files of a dataset that ``save_to_disk`` wrote."""
    splits = folder / "dataset_dict.json"
    state = folder / "state.json"
    if splits.exists():
        names = read_json_object(splits, _FIX).get("splits")
        listed = ", ".join(map(str, names)) if isinstance(names, list) else "unknown"
        what = f"a dataset with the splits {listed}"
        raise MaxlmError(what, where=str(folder), fix="name one of their folders")
    if not state.exists():
        raise MaxlmError("no saved dataset in this folder", where=str(folder), fix=_FIX)
    files = read_json_object(state, _FIX).get("_data_files") or []
    is_list = isinstance(files, list) and all(isinstance(file, dict) for file in files)
    names = [file.get("filename") for file in files] if is_list else []
    # The folder is the whole of a dataset: a name elsewhere is refused, as of a
    # checkpoint's.
    if not names or not all(isinstance(n, str) and n == Path(n).name for n in names):
        what = "no saved dataset in this folder: its _data_files name no files here"
        raise MaxlmError(what, where=str(state), fix=_FIX)
    return [folder / name for name in names]


def _read_arrow(paths: Sequence[Path]) -> Any:
    pa = import_pyarrow(paths[0])
    tables = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                tables.append(pa.parquet.read_table(path, memory_map=True))
            else:
                tables.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            what = f"cannot be read: {error}"
            fix = "write the file again"
            raise MaxlmError(what, where=str(path), fix=fix) from error
    return _ArrowRows(pa.concat_tables(tables))
