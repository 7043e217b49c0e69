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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from maxlm.config import MaxlmError
from maxlm.data.documents.document import Compression, FileSlice, SourceFile

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
"""Compressions by a file name's last suffix, in lower case; other files are not
compressed."""

_BUFFER_BYTES = 1 << 16
_HASH_BLOCK_BYTES = 4 << 20


class DamagedFile(MaxlmError):
    """A file whose content cannot be read, though the file itself can."""


def import_pyarrow(path: Path) -> Any:
    """Imports pyarrow and its Parquet module; `path` is what they are to read, for the
    error."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "reading this file needs pyarrow, which is not installed"
        fix = "pip install 'maxlm[data]'"
        raise MaxlmError(message, where=str(path), fix=fix) from error
    return pyarrow


def _buffer(unpacked: object) -> io.BufferedReader:
    """Buffers a stream of decompressed bytes. It needs no more than ``readinto``, where
    the type of ``BufferedReader`` says a whole raw stream."""
    return io.BufferedReader(cast(io.RawIOBase, unpacked), _BUFFER_BYTES)


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
                    unpacked = gzip.GzipFile(fileobj=file)
                    yield _buffer(unpacked)
                case "zst":
                    # Not zstandard's own reader, which takes a file cut short for a
                    # finished one.
                    unpacked = import_pyarrow(path).CompressedInputStream(file, "zstd")
                    yield _buffer(unpacked)
    except (OSError, EOFError, zlib.error) as error:
        # An error of the system has a number; what a decompressor finds has none.
        if isinstance(error, OSError) and error.errno is not None:
            message = f"cannot read: {error.strerror or error}"
            fix = "check the file and its permissions"
            raise MaxlmError(message, where=str(path), fix=fix) from error
        message = f"damaged or incomplete .{compression} data ({error})"
        fix = "fetch or compress the file again"
        raise DamagedFile(message, where=str(path), fix=fix) from error


@dataclass(frozen=True)
class FileScan:
    """A file's content hash and its slices."""

    sha256: str
    slices: tuple[FileSlice, ...]


def make_whole_slice(file: SourceFile) -> FileSlice:
    """Makes the slice that is the whole file."""
    first_row = 1 if file.format == "jsonl" else 0
    return FileSlice(file, 0, None, first_row, file.size)


def check_unchanged(file: SourceFile, artifact: str) -> None:
    """Checks that a file is as when it was listed; `artifact` is for the error."""
    with open_stream(file.path, "none") as stream:
        state = os.fstat(stream.fileno())
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
        message = f"the file changed while the {artifact} was being built"
        raise MaxlmError(message, where=str(file.path), fix="run the build again")


class _Sha256(Protocol):
    def update(self, data: bytes, /) -> None: ...


def scan_file(file: SourceFile, slice_bytes: int, *, digest: bool = True) -> FileScan:
    """Hash a file and cut it into slices of at least `slice_bytes` where its format
    allows.

    Reads the file once; without `digest` (`sha256` is empty then) only to count lines.
    Cuts depend on the file and `slice_bytes` only.
    """
    hasher = hashlib.sha256()
    slices: list[FileSlice] = []
    if file.format == "jsonl" and file.compression == "none":
        # Lines are counted and hashed in one pass.
        slices += _slice_lines(file, slice_bytes, hasher)
    elif digest:
        for path in (file.path, *file.extra_paths):
            with open_stream(path, "none") as stream:
                for block in iter(partial(stream.read, _HASH_BLOCK_BYTES), b""):
                    hasher.update(block)
    if file.format == "parquet":
        slices += _slice_row_groups(file, slice_bytes)
    if not slices:
        slices.append(make_whole_slice(file))
    return FileScan(hasher.hexdigest() if digest else "", tuple(slices))


def _slice_lines(
    file: SourceFile, slice_bytes: int, hasher: _Sha256
) -> Iterator[FileSlice]:
    """Cut JSONL at line ends; none if it is empty."""
    start = 0
    first_line = 1
    position = 0
    with open_stream(file.path, "none") as stream:
        for next_line, line in enumerate(stream, 2):
            hasher.update(line)
            position += len(line)
            if position - start >= slice_bytes:
                yield FileSlice(file, start, position, first_line, position - start)
                start = position
                first_line = next_line
    if position > start:
        yield FileSlice(file, start, position, first_line, position - start)


def _slice_row_groups(file: SourceFile, slice_bytes: int) -> Iterator[FileSlice]:
    """Cut Parquet between row groups; none if it has no rows."""
    with open_parquet(file.path) as parquet:
        first_group = 0
        first_row = 0
        next_row = 0
        num_bytes = 0
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            columns = [group.column(i) for i in range(group.num_columns)]
            next_row += group.num_rows
            num_bytes += sum(column.total_compressed_size for column in columns)
            is_last = index + 1 == parquet.num_row_groups
            if num_bytes >= slice_bytes or is_last:
                yield FileSlice(file, first_group, index + 1, first_row, num_bytes)
                first_group = index + 1
                first_row = next_row
                num_bytes = 0


@contextmanager
def open_parquet(path: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Opens a pyarrow ParquetFile, closed on leaving. Raises MaxlmError: pyarrow is
    missing, or the file is not (or is damaged) Parquet."""
    pa = import_pyarrow(path)
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as parquet:
            yield parquet
    # UnicodeDecodeError: of the columns' names.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"cannot read as Parquet: {str(error).splitlines()[0]}"
        # An error of the system has a number; what Arrow finds in the bytes has none.
        error_class = MaxlmError if getattr(error, "errno", None) else DamagedFile
        fix = "fetch or write the file again"
        raise error_class(message, where=str(path), fix=fix) from error
