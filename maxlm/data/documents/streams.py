"""Opening source files, compressed or not, as streams of bytes."""

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from maxlm.config import MaxlmError

Compression = Literal["none", "gz", "zst"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
"""By a file name's last suffix, in lower case; other files are not compressed."""

_READ_BYTES = 1 << 20
_FEED_BYTES = 2048


class DamagedFile(MaxlmError):
    """A file whose content cannot be read, though the file itself can."""


def make_missing_package_error(package: str, path: Path) -> MaxlmError:
    """Makes the error for a format whose optional package is not installed."""
    return MaxlmError(
        f"reading this file needs {package}, which is not installed",
        where=str(path),
        fix="pip install 'maxlm[data]'",
    )


@contextmanager
def open_stream(path: Path, compression: Compression) -> Iterator[io.BufferedReader]:
    """Opens a buffered stream of the decompressed bytes of `path`.

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
                    yield io.BufferedReader(_FrameReader(file, _gzip_frame), _READ_BYTES)
                case "zst":
                    yield io.BufferedReader(_FrameReader(file, _zstd_frames(path)), _READ_BYTES)
    except EOFError as error:
        what = f"damaged or incomplete .{compression} data ({error})"
        raise DamagedFile(what, where=str(path), fix="fetch or compress the file again") from error
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise MaxlmError(what, where=str(path), fix="check the file and its permissions") from error


class _FrameReader(io.RawIOBase):
    """Reads all frames of a compressed file, and gives out whatever comes before a damaged place.

    The libraries' own readers lose the last block of data when what follows is damaged; and
    zstandard's takes a truncated file for a finished one, and loses what came after the cut in
    silence. This one raises EOFError.
    """

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any]):
        self._file, self._new_frame = file, new_frame
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        while not self._output:
            # Little at a time, so that a bomb unpacks to 128 MB at once at the very worst.
            self._input = self._input or self._file.read(_FEED_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame is cut short")
                return 0
            self._decompress_input()
        view = memoryview(buffer)
        size = min(len(view), len(self._output))
        view[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _decompress_input(self) -> None:
        if self._frame is None:
            self._input = self._input.lstrip(b"\0")  # Padding, as tapes and disks leave it.
            if not self._input:
                return
            self._frame = self._new_frame()
        try:
            self._output = self._frame.decompress(self._input)
        except Exception as error:  # zlib.error and zstandard.ZstdError have no other base.
            raise EOFError(str(error)) from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None


def _gzip_frame() -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _zstd_frames(path: Path) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError as error:
        raise make_missing_package_error("zstandard", path) from error
    return lambda: zstandard.ZstdDecompressor().decompressobj()
