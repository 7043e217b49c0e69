"""Writes files atomically, and locks folders against a second builder."""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maxlm.config import MaxlmError

_DIGEST = ',\n "sha256": "'


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Turns operating system errors within the block into a MaxlmError that names
    `path`."""
    try:
        yield
    except OSError as error:
        fix = "free some disk space, or check the folder and its permissions"
        message = f"cannot write: {error.strerror or error}"
        raise MaxlmError(message, where=str(path), fix=fix) from error


def check_run_not_moved(path: Path) -> None:
    """Raises MaxlmError if a run's file, or the folder that it is in, was deleted or
    moved."""
    if not path.exists():
        raise MaxlmError(
            "this folder, or a file of the run's in it, was deleted or moved during "
            "the run",
            where=str(path.parent),
            fix="put the run's folder back and run the same command to resume, or set "
            "another name=... to start afresh",
        )


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to; it replaces `path` if the block
    ends well."""
    # A random name, not the process's number: those of two machines that share the disk
    # may be the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with convert_write_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex. Raises OSError if it cannot be
    read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_with_digest(path: Path, text: str) -> None:
    """Write a JSON object, indented by one space, with a SHA-256 of its text as one
    more key."""
    text = text.removesuffix("\n}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    with replace_file(path) as new:
        new.write_text(f'{text}{_DIGEST}{digest}"\n}}\n', "utf-8")


def verify_and_strip_json_digest(text: str) -> str:
    """Return the JSON that `write_json_with_digest` was given; JSON that something else
    wrote as it is. Raises ValueError if the text has changed since it was written."""
    body, separator, rest = text.rpartition(_DIGEST)
    if not separator:
        return text
    digest = hashlib.sha256(body.encode()).hexdigest()
    if rest != f'{digest}"\n}}\n':
        raise ValueError("it has changed since it was written")
    return f"{body}\n}}"


@contextmanager
def lock_folder(
    folder: Path, *, shared: bool = False, wait: bool = False
) -> Iterator[None]:
    """Create `folder` and hold it against other builders, or together with those that
    hold it shared; the lock dies with the process. ``wait``: until it is free."""
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    while True:
        with convert_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # Deleted just now by the builder that is done.
                continue
        try:
            try:
                fcntl.flock(descriptor, operation)
            except BlockingIOError as error:
                message = "another process is at work in this folder"
                fix = "wait for it to end"
                raise MaxlmError(message, where=str(folder), fix=fix) from error
            # The last holder may have deleted the folder between our open and our lock.
            if _is_open_as(folder / "lock", descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Whether the file at a path is the one that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
