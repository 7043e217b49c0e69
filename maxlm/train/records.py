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
from math import isfinite
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from maxlm.config import MaxlmError
from maxlm.run.reporting_config import ReportingConfig, WandbConfig
from maxlm.runtime.files import check_run_not_moved, convert_write_errors, replace_file
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.train.prometheus import PrometheusSink

Numbers = Mapping[str, float]


class Sink(Protocol):
    """Shows a run's numbers outside its own files."""

    def log(self, step: int, values: Numbers) -> None:
        """Takes the numbers of a record."""
        ...

    def event(self, kind: str, details: JsonMapping) -> None:
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
) -> Iterator[JsonObject]:
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
) -> Iterator[JsonObject]:
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
        self._metrics = folder / "metrics.jsonl"
        self._events = folder / "events.jsonl"
        self._write = write
        self._sinks: list[Sink] = []
        with ExitStack() as stack:
            if write:
                for path in (self._metrics, self._events):
                    with convert_write_errors(path):
                        folder.mkdir(parents=True, exist_ok=True)
                        path.touch()
                        # A kill may have cut the last line short.
                        end_of_whole_lines = path.read_bytes().rfind(b"\n") + 1
                        os.truncate(path, end_of_whole_lines)
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

    def log(self, step: int, values: JsonMapping) -> None:
        """Appends one record: ``step`` and finite or non-finite numbers (written as
        null)."""
        numbers: dict[str, float] = {}
        record: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            number = value if isinstance(value, int) else float(value)
            numbers[name] = number
            # JSON has neither NaN nor infinity.
            record[name] = number if isfinite(number) else None
        if self._write:
            _append(self._metrics, record)
        for sink in self._sinks:
            sink.log(step, numbers)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Appends an event with the wall time in seconds; docs/runs.md lists them."""
        self.stopped = kind == "stop"
        if self._write:
            record = {"event": kind, "step": step, "time": time.time(), **details}
            _append(self._events, record)
        for sink in self._sinks:
            sink.event(kind, details)

    def rewind(self, step: int) -> None:
        """Drops every metrics record whose ``step`` is later, with damaged lines behind
        the first of them, and counts the others: training goes on from there once
        more."""
        if not self._write:
            return
        self.damaged_lines = 0
        is_past_step = step < 0
        with replace_file(self._metrics) as temporary, temporary.open("wb") as file:
            for line in self._metrics.open("rb"):
                record = _parse(line)
                if record is None:
                    # A damaged line goes with the records around it.
                    stays = not is_past_step
                    if stays:
                        self.damaged_lines += 1
                else:
                    stays = record["step"] <= step
                    if not stays:
                        is_past_step = True
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
        self._write(step, summary={"value": scalars})

    def event(self, kind: str, details: JsonMapping) -> None:
        """Does nothing."""

    def rewind(self, step: int) -> None:
        # TensorBoard purges what it has from the step of a session's start on.
        self._write(step + 1, session_log={"status": "START"})

    def close(self) -> None:
        with convert_write_errors(self._folder):
            self._file.close()

    def _write(
        self,
        step: int,
        *,
        summary: JsonMapping | None = None,
        session_log: Mapping[str, str] | None = None,
    ) -> None:
        """Writes an event, of whose fields protobuf leaves out those that are None."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with convert_write_errors(self._folder):
            event = Event(
                wall_time=time.time(),
                step=step,
                summary=summary,
                session_log=session_log,
            )
            self._file.write_event(event)
            self._file.flush()


class WandbSink:
    """One run on Weights & Biases for all attempts, by an id kept in the run's folder.

    Steps are an x axis, not W&B's own counter, which refuses to go back: after a rewind
    its curves have the steps that were redone twice.
    """

    def __init__(self, config: WandbConfig, folder: Path):
        import wandb  # pyright: ignore[reportMissingImports]
        import yaml

        config_path = folder / "config.yaml"
        id_path = folder / "wandb" / "run-id"
        if not id_path.exists():
            with convert_write_errors(id_path):
                id_path.parent.mkdir(parents=True, exist_ok=True)
                id_path.write_text(uuid4().hex[:12])
        run_config = None
        if config_path.exists():
            run_config = yaml.safe_load(config_path.read_text())
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=id_path.read_text().strip(),
                resume="allow",
                name=folder.name,
                dir=folder,
                config=run_config,
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

    def event(self, kind: str, details: JsonMapping) -> None:
        """Does nothing."""

    def rewind(self, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        self._run.finish()


def _parse(line: bytes) -> JsonObject | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record


def _append(path: Path, record: JsonMapping) -> None:
    """Writes a record behind the others, whole or not at all; on return the system has
    it."""
    with convert_write_errors(path):
        check_run_not_moved(path)
        size = path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(f"{json.dumps(record)}\n".encode())
        except OSError:  # A full disk may have taken the first part.
            os.truncate(path, size)
            raise
