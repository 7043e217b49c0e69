"""Files of records: JSON lines, each with an integer ``step``, that a full disk or a kill never
leaves torn."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maxlm.data.work.paths import replacing, writing

Record = Mapping[str, Any]


def read_records(path: Path, damaged: list[bytes] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file, none if it is missing.

    Args:
        damaged: lines that hold no record are added to it, but not a last one that has no end:
            that one was cut short by a kill, or is being written.
    """
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (record := _parsed(line)) is not None:
                    yield record
                elif damaged is not None and line.endswith(b"\n"):
                    damaged.append(line)


def damaged_path(path: Path) -> Path:
    """Return the file beside a JSONL file that its damaged lines are moved to."""
    return path.with_name(f"{path.name}.damaged")


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
        with writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._mend()

    def append(self, record: Record) -> None:
        """Write a record behind the others; it is with the operating system on return."""
        rest = f"{json.dumps(record)}\n".encode()
        with writing(self.path):
            size = os.fstat(self._descriptor).st_size
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # A full disk may have taken the first part.
                with suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise

    def keep(self, last_step: int) -> int:
        """Drop every record whose ``step`` is later than ``last_step``, and move damaged lines
        from before them to ``damaged_path``.

        Returns:
            How many damaged lines were moved.
        """
        damaged: list[bytes] = []
        lost = None
        with replacing(self.path) as temporary, temporary.open("w") as file:
            for record in read_records(self.path, damaged):
                if record["step"] <= last_step:
                    file.write(f"{json.dumps(record)}\n")
                elif lost is None:
                    lost = len(damaged)
            if damaged[:lost]:
                with damaged_path(self.path).open("ab") as aside:
                    aside.writelines(damaged[:lost])
            file.flush()
            os.fsync(file.fileno())
        with writing(self.path):
            replaced, self._descriptor = (
                self._descriptor,
                os.open(self.path, os.O_RDWR | os.O_APPEND),
            )
        os.close(replaced)
        return len(damaged[:lost])

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
