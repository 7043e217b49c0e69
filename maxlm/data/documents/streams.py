"""Opening source files, compressed or not, as streams of bytes."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from maxlm.config import MaxlmError

Compression = Literal["none", "gz", "zst"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
"""By a file name's last suffix, in lower case; other files are not compressed."""

_READ_BYTES = 1 << 16


class DamagedFile(MaxlmError):
    """A file whose content cannot be read, though the file itself can."""


def make_missing_package_error(path: Path) -> MaxlmError:
    """Makes the error for a format that pyarrow reads, which is not installed."""
    return MaxlmError(
        "reading this file needs pyarrow, which is not installed",
        where=str(path),
        fix="pip install 'maxlm[data]'",
    )


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[io.BufferedReader]:
    """Opens a buffered stream of the decompressed bytes of `path`.

    Raises:
        MaxlmError: the file cannot be read (also when that shows only midway), its compressed
            data are damaged or cut short, or pyarrow is missing.
    """
    try:
        with open(path, "rb") as file:
            match compression:
                case "none":
                    yield file
                case "gz":
                    unpacked = gzip.GzipFile(fileobj=file)
                    yield io.BufferedReader(unpacked, _READ_BYTES)  # pyright: ignore[reportArgumentType]
                case "zst":
                    yield io.BufferedReader(_open_zstd(file, path), _READ_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            what, fix = error.strerror or str(error), "check the file and its permissions"
            raise MaxlmError(f"cannot read: {what}", where=str(path), fix=fix) from error
        what = f"damaged or incomplete .{compression} data ({error})"
        raise DamagedFile(what, where=str(path), fix="fetch or compress the file again") from error


def _open_zstd(file: io.BufferedReader, path: Path) -> Any:
    # Not zstandard's own reader, which takes a file that is cut short for a finished one.
    try:
        import pyarrow as pa
    except ImportError as error:
        raise make_missing_package_error(path) from error
    return pa.CompressedInputStream(file, "zstd")
