"""Opening source files, compressed or not, as streams of bytes."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from maxlm.config import MaxlmError

Compression = Literal["none", "gz", "zst"]

READ_BYTES = 1 << 20


def missing_package(package: str, path: Path) -> MaxlmError:
    """The error for a format whose optional reader is not installed."""
    return MaxlmError(
        f"reading this file needs {package}, which is not installed",
        where=str(path),
        fix="pip install 'maxlm[data]'",
    )


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[IO[bytes]]:
    """A buffered stream of the decompressed bytes of `path`.

    Raises:
        MaxlmError: the file cannot be read (also when that shows only midway), its compressed
            data are damaged or cut short, or zstandard is missing.
    """
    try:
        with open(path, "rb") as file:
            match compression:
                case "none":
                    yield file
                case "gz":
                    with gzip.open(file, "rb") as stream:
                        yield io.BufferedReader(stream, READ_BYTES)  # pyright: ignore[reportArgumentType]
                case "zst":
                    yield io.BufferedReader(_ZstdReader(file, path), READ_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"damaged or incomplete .{compression} data ({error})"
        raise MaxlmError(what, where=str(path), fix="fetch or compress the file again") from error
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise MaxlmError(what, where=str(path), fix="check the file and its permissions") from error


class _ZstdReader(io.RawIOBase):
    """Reads all frames of a .zst file.

    zstandard's own stream reader takes a truncated file for a finished one, and would lose the
    documents after the cut in silence; this one raises EOFError.
    """

    def __init__(self, file: IO[bytes], path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise missing_package("zstandard", path) from error
        self._file, self._module = file, zstandard
        self._frame = None
        self._input = b""
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame is cut short")
                return 0
            self._step()
        view = memoryview(buffer)
        size = min(len(view), len(self._output))
        view[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _step(self) -> None:
        frame = self._frame or self._module.ZstdDecompressor().decompressobj()
        try:
            self._output = frame.decompress(self._input)
        except self._module.ZstdError as error:
            raise EOFError(str(error)) from error
        self._input = frame.unused_data if frame.eof else b""
        self._frame = None if frame.eof else frame
