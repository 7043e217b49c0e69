"""Opening source files as streams, and cutting them into slices that can be read
apart."""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.documents.document import Compression, FileSlice, SourceFile

COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
"""Compressions by a file name's last suffix, in lower case; other files are not
compressed."""

_READ_BYTES = 1 << 16
_BLOCK_BYTES = 4 << 20


class DamagedFile(MaxlmError):
    """A file whose content cannot be read, though the file itself can."""


def import_pyarrow(path: Path) -> Any:
    """Imports pyarrow and its Parquet module; `path` is what they are to read, for the
    error."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        what = "reading this file needs pyarrow, which is not installed"
        raise MaxlmError(
            what, where=str(path), fix="pip install 'maxlm[data]'"
        ) from error
    return pyarrow


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[io.BufferedReader]:
    """Opens a buffered stream of the decompressed bytes of `path`. Raises MaxlmError:
    the file cannot be read (also when that shows only midway), its compressed data are
    damaged or cut short, or pyarrow is missing."""
    try:
        with open(path, "rb") as file:
            match compression:
                case "none":
                    yield file
                case "gz":
                    unpacked: Any = gzip.GzipFile(fileobj=file)
                    yield io.BufferedReader(unpacked, _READ_BYTES)
                case "zst":
                    # Not zstandard's own reader, which takes a file cut short for a
                    # finished one.
                    unpacked = import_pyarrow(path).CompressedInputStream(file, "zstd")
                    yield io.BufferedReader(unpacked, _READ_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            what = error.strerror or str(error)
            fix = "check the file and its permissions"
            raise MaxlmError(
                f"cannot read: {what}", where=str(path), fix=fix
            ) from error
        what = f"damaged or incomplete .{compression} data ({error})"
        raise DamagedFile(
            what, where=str(path), fix="fetch or compress the file again"
        ) from error


@dataclass(frozen=True)
class FileScan:
    """A file's content hash and its slices."""

    sha256: str
    slices: tuple[FileSlice, ...]


def make_whole_slice(file: SourceFile) -> FileSlice:
    """Makes the slice that is the whole file."""
    return FileSlice(file, 0, None, 1 if file.format == "jsonl" else 0, file.size)


def check_unchanged(file: SourceFile, artifact: str) -> None:
    """Checks that a file is as when it was listed; `artifact` is for the error."""
    with open_stream(file.path, "none") as stream:
        state = os.fstat(stream.fileno())
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
        what = f"the file changed while the {artifact} was being built"
        raise MaxlmError(what, where=str(file.path), fix="run the build again")


def scan_file(file: SourceFile, slice_bytes: int, *, digest: bool = True) -> FileScan:
    """Hash a file and cut it into slices of at least `slice_bytes` where its format
    allows.

    Reads the file once; without `digest` (`sha256` is empty then) only to count lines.
    Cuts depend on the file and `slice_bytes` only.
    """
    cut_lines = file.format == "jsonl" and file.compression == "none"
    hasher = hashlib.sha256()
    cuts = [(0, 1)]
    position = 0
    for path in (file.path, *file.extra_paths) if digest or cut_lines else ():
        with open_stream(path, "none") as stream:
            blocks = (
                stream if cut_lines else iter(partial(stream.read, _BLOCK_BYTES), b"")
            )
            for number, block in enumerate(blocks, 2):
                hasher.update(block)
                position += len(block)
                if cut_lines and position - cuts[-1][0] >= slice_bytes:
                    cuts.append((position, number))
    slices: list[FileSlice] = []
    if file.format == "parquet":
        slices += _parquet_slices(file, slice_bytes)
    elif cut_lines:
        cuts = [cut for cut in cuts if cut[0] < position]
        for (start, first), (stop, _) in pairwise([*cuts, (position, 0)]):
            slices.append(FileSlice(file, start, stop, first, stop - start))
    whole = (make_whole_slice(file),)
    return FileScan(hasher.hexdigest() if digest else "", tuple(slices) or whole)


def _parquet_slices(file: SourceFile, slice_bytes: int) -> Iterator[FileSlice]:
    with open_parquet(file.path) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        start = first = row = size = 0
        for index, group in enumerate(groups):
            row += group.num_rows
            size += sum(
                group.column(c).total_compressed_size for c in range(group.num_columns)
            )
            if size >= slice_bytes or index + 1 == len(groups):
                yield FileSlice(file, start, index + 1, first, size)
                start = index + 1
                first = row
                size = 0


@contextmanager
def open_parquet(path: Path):
    """Opens a pyarrow ParquetFile, closed on leaving. Raises MaxlmError: pyarrow is
    missing, or the file is not (or is damaged) Parquet."""
    pa = import_pyarrow(path)
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as parquet:
            yield parquet
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # The last: of names.
        what = f"cannot read as Parquet: {str(error).splitlines()[0]}"
        # An error of the system has a number; what Arrow finds in the bytes has none.
        kind = MaxlmError if getattr(error, "errno", None) else DamagedFile
        raise kind(
            what, where=str(path), fix="fetch or write the file again"
        ) from error
