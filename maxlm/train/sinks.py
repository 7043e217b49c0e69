"""Metrics elsewhere: TensorBoard, Weights & Biases, Prometheus.

A sink is made for one attempt of a run, by process 0. All of them get plain numbers.
"""

import errno
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.train.reporting import ReportingConfig, WandbConfig

Numbers = Mapping[str, float]

# What a run's wall time is spent on, as its ``progress`` events count it.
SPENT = ("stepping", "loading", "saving", "evaluating")


class Sink:
    """Receives metrics by step. The base class ignores them."""

    def log(self, step: int, values: Numbers) -> None:
        """Take the numbers of a step."""

    def event(self, kind: str, details: Mapping[str, Any]) -> None:
        """Take an event of ``events.jsonl``."""

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``."""

    def close(self) -> None:
        """Write everything out."""


def open_sinks(config: ReportingConfig, folder: Path, resume_step: int) -> Iterator[Sink]:
    """The sinks that a run asks for, each once it is open.

    Args:
        folder: the run's; exists.
        resume_step: what TensorBoard has of later steps is withdrawn; 0: a new run.

    Raises:
        MaxlmError: a package is missing, a port is taken, W&B refuses, no place to write.
    """
    config.check()
    if config.prometheus_port is not None:
        yield PrometheusSink(config.prometheus_address, config.prometheus_port)
    if config.tensorboard:
        yield TensorBoardSink(folder / "tensorboard", resume_step)
    if config.wandb is not None and config.wandb.mode != "disabled":
        yield WandbSink(config.wandb, folder)


class TensorBoardSink(Sink):
    """Event files, one an attempt.

    Written in the caller's thread: tensorboardX's own writer hands events to a thread, which a full
    disk ends, and then waits for it for ever.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        from tensorboardX.event_file_writer import EventsWriter

        with convert_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = folder
            # Its file names go by the second: a quick restart would overwrite the last one's.
            suffix = f".{resume_step}.{os.getpid()}"
            self._file = EventsWriter(str(folder / "events"), suffix)
        if resume_step:
            self.rewind(resume_step)

    def log(self, step: int, values: Numbers) -> None:
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": scalars})

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


class WandbSink(Sink):
    """One run on Weights & Biases for all attempts, by an id kept in the run's folder.

    Steps are an x axis, not W&B's own counter, which refuses to go back: after a rewind its curves
    have the steps that were redone twice.
    """

    def __init__(self, config: WandbConfig, folder: Path):
        import wandb  # pyright: ignore[reportMissingImports]
        import yaml

        described = folder / "config.yaml"
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=_kept_id(folder / "wandb" / "run-id"),
                resume="allow",
                name=folder.name,
                dir=folder,
                config=yaml.safe_load(described.read_text()) if described.exists() else None,
                # Its process gets a job's SIGTERM as well; an upload must not hold up the exit.
                settings=wandb.Settings(console="off", silent=True, finish_timeout=15),
            )
        except wandb.Error as error:
            raise MaxlmError(
                f"Weights & Biases: {error}",
                where="reporting.wandb",
                fix="run wandb login, or set reporting.wandb.mode=offline",
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Numbers) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _kept_id(path: Path) -> str:
    """An id that lives as long as the run's folder, and moves with it."""
    if not path.exists():
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            temporary.write_text(uuid4().hex[:12])
    return path.read_text().strip()


class PrometheusSink(Sink):
    """An HTTP endpoint with the newest value of every number: ``maxlm_step``, ``maxlm_loss``, ...

    Beside them ``maxlm_last_step_timestamp`` (unix seconds: an alarm for a run that stands still),
    ``maxlm_time_seconds_total{spent=...}`` of this attempt (the rate of ``stepping`` is goodput),
    and ``maxlm_events_total{event=...}``.

    Raises:
        MaxlmError: the address or the port is not free or not this host's.
    """

    def __init__(self, address: str, port: int):
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        self._registry, self._gauges = CollectorRegistry(), {}
        self._gauge = Gauge
        self._spent = dict.fromkeys(SPENT, 0.0)
        about = {"registry": self._registry, "namespace": "maxlm"}
        self._seconds = Counter("time_seconds", "Of this attempt, by use", ["spent"], **about)
        self._events = Counter("events", "What happened in this attempt", ["event"], **about)
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
            which, fix = "address", "name an address of this host, or 0.0.0.0 for all of them"
            if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
                which, fix = "port", "name another one, or end what uses it"
            why = getattr(error, "strerror", None) or error
            raise MaxlmError(
                f"cannot listen on {address} port {port}: {why}",
                where=f"reporting.prometheus_{which}",
                fix=fix,
            ) from error

    def log(self, step: int, values: Numbers) -> None:
        for name, value in {**values, "step": step, "last_step_timestamp": time.time()}.items():
            name = "maxlm_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, "Its newest value", registry=self._registry)
            self._gauges[name].set(value)

    def event(self, kind: str, details: Mapping[str, Any]) -> None:
        self._events.labels(kind).inc()
        if kind == "rollback":  # ``progress`` counts anew from here.
            self._spent = dict.fromkeys(SPENT, 0.0)
        if kind == "progress":
            for spent, before in self._spent.items():
                now = max(before, details.get(spent, before))
                self._seconds.labels(spent).inc(now - before)
                self._spent[spent] = now

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
