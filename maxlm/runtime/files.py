"""Folders in the making: errors of writing, and one builder at a time."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maxlm.config import MaxlmError

_DIGEST = ',\n "sha256": "'


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn operating system errors into a MaxlmError that names `path`."""
    try:
        yield
    except OSError as error:
        fix = "free some disk space, or check the folder and its permissions"
        what = f"cannot write: {error.strerror or error}"
        raise MaxlmError(what, where=str(path), fix=fix) from error


def check_not_deleted(path: Path) -> None:
    """
    Raises:
        MaxlmError: a run's file, or the folder that it is in, is not there any more.
    """
    if not path.exists():
        raise MaxlmError(
            "this folder, or a file of the run's in it, was deleted or moved during the run",
            where=str(path.parent),
            fix="put the run's folder back and run the same command to resume, or set another "
            "name=... to start afresh",
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place if the block ends well.

    Raises:
        MaxlmError: as `writing`; `path` is as before then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, text: str) -> None:
    """Write a JSON object, indented by one space, with a SHA-256 of its text as one more key.

    Raises:
        MaxlmError: as `writing`; `path` is as before then.
    """
    text = text.removesuffix("\n}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    with replacing(path) as new:
        new.write_text(f'{text}{_DIGEST}{digest}"\n}}\n', "utf-8")


def without_digest(text: str) -> str:
    """Return the JSON that `write_json` was given; JSON that something else wrote as it is.

    Raises:
        ValueError: the text has changed since it was written.
    """
    text, found, rest = text.rpartition(_DIGEST)
    if found and rest != f'{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n':
        raise ValueError("it has changed since it was written")
    return f"{text}\n}}" if found else rest


@contextmanager
def locked_folder(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Create `folder` and hold it against other builders; the lock dies with the process.

    Args:
        shared: hold it together with others that hold it shared.
        wait: until it is free.

    Raises:
        MaxlmError: it cannot be created, or (without `wait`) another process holds it.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # Deleted just now by the builder that is done.
                continue
        try:
            try:
                fcntl.flock(descriptor, how)
            except BlockingIOError as error:
                what = "another process is at work in this folder"
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
