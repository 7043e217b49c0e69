"""Files of records: JSON lines, each with an integer ``step``, that a full disk or a kill never
leaves torn."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maxlm.runtime.files import check_not_deleted, convert_write_errors, replace_file

Record = Mapping[str, Any]


def read_records(path: Path, damaged: list[bytes] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file, none if it is missing; lines that hold none are added to
    ``damaged``, but not a last one without an end: a kill cut it short, or it is being written."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (record := _parsed(line)) is not None:
                    yield record
                elif damaged is not None and line.endswith(b"\n"):
                    damaged.append(line)


class RecordFile:
    """A JSONL file that one process appends to: each record as a whole, or not at all.

    What a kill left of a last record is removed first. Threads may share it.

    Args:
        path: in a folder that exists.

    Raises:
        MaxlmError: it cannot be written, here and in every method.
    """

    def __init__(self, path: Path):
        self.path = path
        with convert_write_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._mend()

    def append(self, record: Record) -> None:
        """Write a record behind the others; it is with the operating system on return."""
        line = rest = f"{json.dumps(record)}\n".encode()
        with convert_write_errors(self.path):
            check_not_deleted(self.path)  # The descriptor would take it none the less.
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # A full disk may have taken the first part.
                with suppress(OSError):
                    size = os.fstat(self._descriptor).st_size
                    os.ftruncate(self._descriptor, size - (len(line) - len(rest)))
                raise

    def keep(self, last_step: int) -> int:
        """Drop every record whose ``step`` is later than ``last_step``, with damaged lines behind
        the first of them; return how many damaged lines stay."""
        damaged, past = 0, last_step < 0
        with replace_file(self.path) as temporary, temporary.open("wb") as file:
            for line in self.path.open("rb"):
                record = _parsed(line)
                stays = not past if record is None else record["step"] <= last_step
                past |= record is not None and not stays
                damaged += record is None and stays
                if stays:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        with convert_write_errors(self.path):
            replaced, self._descriptor = (
                self._descriptor,
                os.open(self.path, os.O_RDWR | os.O_APPEND),
            )
        os.close(replaced)
        return damaged

    def close(self) -> None:
        """Give the file back; nothing is left to be written."""
        os.close(self._descriptor)

    def _mend(self) -> None:
        size = os.fstat(self._descriptor).st_size
        if not size:
            return
        with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as written:
            whole = written.rfind(b"\n") + 1
            last = written[whole:]
        if last and _parsed(last) is None:
            os.ftruncate(self._descriptor, whole)
        elif last:  # Only its end of line is missing.
            os.write(self._descriptor, b"\n")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if known else None
