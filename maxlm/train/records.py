"""A run's records, in its own files and elsewhere: TensorBoard, Weights & Biases,
Prometheus.

Its own are JSON lines, each with an integer ``step``, the number of updates made so
far. A last line that a kill cut short is removed before the next one is written. A sink
is made for one attempt of a run, by process 0.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from maxlm.config import MaxlmError
from maxlm.run.reporting_config import ReportingConfig, WandbConfig
from maxlm.runtime.files import check_file_exists, convert_write_errors, replace_file
from maxlm.train.prometheus import PrometheusSink

Numbers = Mapping[str, float]


class Sink(Protocol):
    """Shows a run's numbers outside its own files."""

    def log(self, step: int, values: Numbers) -> None:
        """Takes the numbers of a record."""
        ...

    def event(self, kind: str, details: Mapping[str, Any]) -> None:
        """Takes an event of ``events.jsonl``."""
        ...

    def rewind(self, step: int) -> None:
        """Withdraws what was logged of later steps, where it can."""
        ...

    def close(self) -> None:
        """Writes everything out."""
        ...


def read_records(
    path: Path, damaged_lines: list[bytes] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSONL file, none if it is missing. Adds lines that hold
    none to ``damaged_lines``, but not a last one without an end: it was cut short, or
    is being written."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                record = _parse(line)
                if record is not None:
                    yield record
                elif damaged_lines is not None and line.endswith(b"\n"):
                    damaged_lines.append(line)


def read_events(
    path: Path, damaged_lines: list[bytes] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the records of an events.jsonl, each with a kind, ``event``, and a
    ``time``, as :func:`read_records` does; those without are damaged lines too."""
    for record in read_records(path, damaged_lines):
        is_event = isinstance(record.get("event"), str)
        if is_event and isinstance(record.get("time"), int | float):
            yield record
        elif damaged_lines is not None:
            damaged_lines.append(json.dumps(record).encode())


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """``metrics.jsonl`` and ``events.jsonl`` in a run folder, and what shows them
    elsewhere.

    Resuming at a step drops every record after it, so that a run that was killed leaves
    the same ``metrics.jsonl`` as one that was not, but for times, rates and memory.
    ``events.jsonl`` only grows: `maxlm.train.goodput` tells from it where the time
    of all attempts went.

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
        folder = Path(folder)
        self._metrics, self._events = folder / "metrics.jsonl", folder / "events.jsonl"
        self._write, self._sinks = write, list[Sink]()
        with ExitStack() as stack:
            if write:
                for path in (self._metrics, self._events):
                    with convert_write_errors(path):
                        folder.mkdir(parents=True, exist_ok=True)
                        path.touch()
                        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
                # A run that begins anew has no step 0 in its records.
                self.rewind(resume_step if resume_step else -1)
                if reporting.prometheus_port is not None:
                    sink = PrometheusSink(
                        reporting.prometheus_address, reporting.prometheus_port
                    )
                    self._sinks.append(stack.enter_context(closing(sink)))
                if reporting.tensorboard:
                    sink = TensorBoardSink(folder / "tensorboard", resume_step)
                    self._sinks.append(stack.enter_context(closing(sink)))
                if reporting.wandb is not None and reporting.wandb.mode != "disabled":
                    sink = WandbSink(reporting.wandb, folder)
                    self._sinks.append(stack.enter_context(closing(sink)))
            self._open = stack.pop_all()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record: ``step`` and finite or non-finite numbers (written as
        null)."""
        numbers = {
            name: v if isinstance(v, int) else float(v) for name, v in values.items()
        }
        if self._write:
            # JSON has neither NaN nor infinity.
            finite = {
                n: v if abs(v) < float("inf") else None for n, v in numbers.items()
            }
            _append(self._metrics, {"step": step, **finite})
        for sink in self._sinks:
            sink.log(step, numbers)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Appends an event with the wall time in seconds; docs/runs.md lists them."""
        self.stopped = kind == "stop"
        if self._write:
            _append(
                self._events,
                {"event": kind, "step": step, "time": time.time(), **details},
            )
        for sink in self._sinks:
            sink.event(kind, details)

    def rewind(self, step: int) -> None:
        """Drops every metrics record whose ``step`` is later, with damaged lines behind
        the first of them, and counts the others: training goes on from there once
        more."""
        if not self._write:
            return
        self.damaged_lines = 0
        past = step < 0
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
        for sink in self._sinks:
            sink.rewind(step)

    def __exit__(self, *_: object) -> None:
        self._open.close()


class TensorBoardSink:
    """Event files, one an attempt, which withdraw what earlier ones have of steps after
    ``resume_step`` (0: a new run). Written in the caller's thread: tensorboardX's own
    writer waits for ever for a thread that a full disk has ended."""

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter

        with convert_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = folder
            # Its file names go by the second: a quick restart would overwrite the last
            # one's.
            self._file = EventsWriter(
                str(folder / "events"), f".{resume_step}.{os.getpid()}"
            )
        if resume_step:
            self.rewind(resume_step)

    def log(self, step: int, values: Numbers) -> None:
        scalars = [
            {"tag": name, "simple_value": value} for name, value in values.items()
        ]
        self._write(step=step, summary={"value": scalars})

    def event(self, kind: str, details: Mapping[str, Any]) -> None:
        """Does nothing."""

    def rewind(self, step: int) -> None:
        # TensorBoard purges what it has from the step of a session's start on.
        self._write(step=step + 1, session_log={"status": "START"})

    def close(self) -> None:
        with convert_write_errors(self._folder):
            self._file.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with convert_write_errors(self._folder):
            self._file.write_event(Event(wall_time=time.time(), **content))
            self._file.flush()


class WandbSink:
    """One run on Weights & Biases for all attempts, by an id kept in the run's folder.

    Steps are an x axis, not W&B's own counter, which refuses to go back: after a rewind
    its curves have the steps that were redone twice.
    """

    def __init__(self, config: WandbConfig, folder: Path):
        import wandb  # pyright: ignore[reportMissingImports]
        import yaml

        described, kept_id = folder / "config.yaml", folder / "wandb" / "run-id"
        if not kept_id.exists():
            with convert_write_errors(kept_id):
                kept_id.parent.mkdir(parents=True, exist_ok=True)
                kept_id.write_text(uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=kept_id.read_text().strip(),
                resume="allow",
                name=folder.name,
                dir=folder,
                config=yaml.safe_load(described.read_text())
                if described.exists()
                else None,
                # Its process gets a job's SIGTERM as well; an upload must not hold up
                # the exit.
                settings=wandb.Settings(console="off", silent=True, finish_timeout=15),
            )
        except wandb.Error as error:
            message = f"Weights & Biases: {error}"
            fix = "run wandb login, or set reporting.wandb.mode=offline"
            raise MaxlmError(message, where="reporting.wandb", fix=fix) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Numbers) -> None:
        self._run.log({"step": step, **values})

    def event(self, kind: str, details: Mapping[str, Any]) -> None:
        """Does nothing."""

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        self._run.finish()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return (
        record
        if isinstance(record, dict) and isinstance(record.get("step"), int)
        else None
    )


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record behind the others, whole or not at all; on return the system has
    it."""
    with convert_write_errors(path):
        check_file_exists(path)
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(f"{json.dumps(record)}\n".encode())
        except OSError:  # A full disk may have taken the first part.
            os.truncate(path, size)
            raise
