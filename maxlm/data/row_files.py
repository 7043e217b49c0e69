"""Files of rows, each a dictionary: JSON Lines, Parquet, datasets saved to disk."""

import json
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.documents.streams import COMPRESSIONS, import_pyarrow, open_stream

_FIX = "name a .jsonl (.gz, .zst) or .parquet file, or a dataset's folder"

_OPENED: dict[Path, Any] = {}
"""Rows of the files that this process reads: `_JsonLines`, or an Arrow table."""


@dataclass(frozen=True)
class RowFiles:
    """The rows of some files by number, one file after the other; small to pickle."""

    paths: tuple[Path, ...]
    starts: tuple[int, ...]
    """Number of each file's first row, and of all rows."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        file, row = self._find(index)
        if (path := self.paths[file]) not in _OPENED:
            _OPENED[path] = _read_file(path)
        rows = _OPENED[path]
        return rows[row] if isinstance(rows, _JsonLines) else rows.slice(row, 1).to_pylist()[0]

    def locate(self, index: int) -> str:
        """Returns the file and the place in it of a row, counted from 0, for messages."""
        file, row = self._find(index)
        return f"{self.paths[file]}: row {row}"

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return file, index - self.starts[file]


def open_rows(*paths: str | Path) -> RowFiles:
    """Opens files of rows: ``.jsonl`` and ``.json``, also compressed (``.gz``, ``.zst``),
    ``.parquet``, ``.arrow`` streams, and folders that Hugging Face's ``datasets`` saved. Raises
    MaxlmError: a file that is missing, empty or none of these."""
    opened = [Path(path) for path in paths]
    _OPENED.update((path, _read_file(path)) for path in opened)  # they may be written anew
    sizes = [len(_OPENED[path]) for path in opened]
    return RowFiles(tuple(opened), tuple(np.cumsum([0, *sizes]).tolist()))


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
            if isinstance(row := json.loads(self._data[slice(*self._spans[index])]), dict):
                return row
        except (ValueError, RecursionError) as error:
            fault = f" ({error})"
        what, fix = f"no JSON object{fault}", "write one object on each line"
        raise MaxlmError(what, where=f"{self._path}: row {index}", fix=fix)


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
            rows = _JsonLines(path, b"" if empty else mmap.mmap(file.fileno(), 0, access=read))
    if not len(rows):
        raise MaxlmError("the file has no rows", where=str(path), fix="give it some")
    return rows


def _list_arrow_files(folder: Path) -> list[Path]:
    """The files of a dataset that ``save_to_disk`` wrote."""
    try:
        if (splits := folder / "dataset_dict.json").exists():
            names = ", ".join(json.loads(splits.read_text("utf-8"))["splits"])
            what, fix = f"a dataset with the splits {names}", "name one of their folders"
            raise MaxlmError(what, where=str(folder), fix=fix)
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise MaxlmError("no saved dataset in this folder", where=str(folder), fix=_FIX) from None


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
            what, fix = f"cannot be read: {error}", "write the file again"
            raise MaxlmError(what, where=str(path), fix=fix) from error
    return pa.concat_tables(tables)
