"""Folders in the making: errors of writing, and one builder at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maxlm.config import MaxlmError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn operating system errors into a MaxlmError that names `path`."""
    try:
        yield
    except OSError as error:
        fix = "free some disk space, or check the folder and its permissions"
        what = f"cannot write: {error.strerror or error}"
        raise MaxlmError(what, where=str(path), fix=fix) from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it against other builders; the lock dies with the process.

    Raises:
        MaxlmError: it cannot be created, or another process holds it.
    """
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = "another process is building this store"
                raise MaxlmError(what, where=str(folder), fix="wait for it to end") from error
            # The last holder may have deleted the folder between our open and our lock.
            if _is_file(folder / "lock", descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
