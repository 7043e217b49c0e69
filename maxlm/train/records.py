"""A run's records: JSON lines, each with an integer ``step``, the number of updates made so far. A
last line that a kill cut short is removed before the next one is written."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from maxlm.runtime.files import check_file_exists, convert_write_errors, replace_file
from maxlm.train.reporting import Numbers, ReportingConfig, Sink, open_sinks


def read_records(path: Path, damaged_lines: list[bytes] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSONL file, none if it is missing. Adds lines that hold none to
    ``damaged_lines``, but not a last one without an end: it was cut short, or is being written."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (record := _parse(line)) is not None:
                    yield record
                elif damaged_lines is not None and line.endswith(b"\n"):
                    damaged_lines.append(line)


class JsonlSink(Sink):
    """``metrics.jsonl`` and ``events.jsonl`` in a run's folder.

    Args:
        resume_step: records up to and including this step are kept; 0: none.
    """

    def __init__(self, folder: Path, resume_step: int):
        self._metrics, self._events = folder / "metrics.jsonl", folder / "events.jsonl"
        for path in (self._metrics, self._events):
            with convert_write_errors(path):
                folder.mkdir(parents=True, exist_ok=True)
                path.touch()
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.damaged_lines = 0
        # A run that begins anew has no step 0 in its records.
        self.rewind(resume_step if resume_step else -1)

    def log(self, step: int, values: Numbers) -> None:
        # JSON has neither NaN nor infinity.
        finite = {n: v if abs(v) < float("inf") else None for n, v in values.items()}
        _append(self._metrics, {"step": step, **finite})

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        _append(self._events, {"event": kind, "step": step, "time": time.time(), **details})

    def rewind(self, step: int) -> None:
        """Drops every metrics record whose ``step`` is later, with damaged lines behind the first
        of them; the others are counted."""
        self.damaged_lines, past = 0, step < 0
        with replace_file(self._metrics) as temporary, temporary.open("wb") as file:
            for line in self._metrics.open("rb"):
                record = _parse(line)
                stays = not past if record is None else record["step"] <= step
                past |= record is not None and not stays
                self.damaged_lines += record is None and stays
                if stays:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())


class MetricsLog:
    """``metrics.jsonl`` and ``events.jsonl`` in a run folder, and what shows them elsewhere.

    Resuming at a step drops every record after it, so that a run that was killed leaves the same
    ``metrics.jsonl`` as one that was not, but for times, rates and memory. ``events.jsonl`` only
    grows: `maxlm.programs.goodput` tells from it where the time of all attempts went.

    Args:
        folder: the run folder; made if missing.
        resume_step: keep records up to and including this step; 0 begins anew.
        write: False on all processes but the first: every method then does nothing.

    Raises MaxlmError where a file cannot be written, here and in every method.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int = 0,
        *,
        write: bool = True,
        reporting: ReportingConfig = ReportingConfig(),
    ):
        self.stopped = False
        """Whether the attempt's end is written down."""
        self.damaged_lines = 0
        """Number of lines of ``metrics.jsonl`` that hold no record."""
        self._sinks: list[Sink] = []
        with ExitStack() as stack:
            if write:
                records = JsonlSink(Path(folder), resume_step)
                self.damaged_lines = records.damaged_lines
                for sink in chain([records], open_sinks(reporting, Path(folder), resume_step)):
                    stack.callback(sink.close)
                    self._sinks.append(sink)
            self._open = stack.pop_all()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record: ``step`` and finite or non-finite numbers (written as null)."""
        numbers = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        for sink in self._sinks:
            sink.log(step, numbers)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Appends an event with the wall time in seconds; docs/runs.md lists them."""
        self.stopped = kind == "stop"
        for sink in self._sinks:
            sink.event(kind, step, details)

    def rewind(self, step: int) -> None:
        """Drops the records after ``step``: training goes on from there once more."""
        for sink in self._sinks:
            sink.rewind(step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if known else None


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record behind the others, whole or not at all; it is with the operating system on
    return."""
    with convert_write_errors(path):
        check_file_exists(path)
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(f"{json.dumps(record)}\n".encode())
        except OSError:  # A full disk may have taken the first part.
            os.truncate(path, size)
            raise
