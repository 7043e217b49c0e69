"""Files of records: JSON lines, each with an integer ``step``, that a full disk or a kill never
leaves torn."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maxlm.runtime.files import check_not_deleted, convert_write_errors, replace_file
from maxlm.train.reporting import Numbers, Sink


def read_records(path: Path, damaged: list[bytes] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSONL file, none if it is missing; lines that hold none are added to
    ``damaged``, but not a last one without an end: a kill cut it short, or it is being written."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (record := _parse(line)) is not None:
                    yield record
                elif damaged is not None and line.endswith(b"\n"):
                    damaged.append(line)


class RecordFile:
    """A JSONL file that one process appends to: each record as a whole, or not at all. A last line
    that a kill cut short is removed first. Threads may share it. Where it cannot be written every
    method raises MaxlmError."""

    def __init__(self, path: Path):
        self.path = path
        with convert_write_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._descriptor).st_size
            whole = os.pread(self._descriptor, size, 0).rfind(b"\n") + 1
            if whole < size:
                os.ftruncate(self._descriptor, whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record behind the others; it is with the operating system on return."""
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
        """Drops every record whose ``step`` is later than ``last_step``, with damaged lines behind
        the first of them; returns how many damaged lines stay."""
        damaged, past = 0, last_step < 0
        with replace_file(self.path) as temporary, temporary.open("wb") as file:
            for line in self.path.open("rb"):
                record = _parse(line)
                stays = not past if record is None else record["step"] <= last_step
                past |= record is not None and not stays
                damaged += record is None and stays
                if stays:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.close()
        with convert_write_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        return damaged

    def close(self) -> None:
        os.close(self._descriptor)


class RecordSink(Sink):
    """``metrics.jsonl`` and ``events.jsonl`` in a run's folder.

    Args:
        resume_step: records up to and including this step are kept; 0: none.
    """

    def __init__(self, folder: Path, resume_step: int):
        with convert_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._metrics = RecordFile(folder / "metrics.jsonl")
        self._events = RecordFile(folder / "events.jsonl")
        # A run that begins anew has no step 0 in its records.
        self.damaged_lines = self._metrics.keep(resume_step if resume_step else -1)

    def log(self, step: int, values: Numbers) -> None:
        # JSON has neither NaN nor infinity.
        finite = {n: v if abs(v) < float("inf") else None for n, v in values.items()}
        self._metrics.append({"step": step, **finite})

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        self._events.append({"event": kind, "step": step, "time": time.time(), **details})

    def rewind(self, step: int) -> None:
        self._metrics.keep(step)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if known else None
