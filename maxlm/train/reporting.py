"""Reports a run's numbers to TensorBoard, Weights & Biases and Prometheus, beside its own files.

A sink is made for one attempt of a run, by process 0.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.runtime.files import convert_write_errors

Numbers = Mapping[str, float]


class WandbConfig(Config):
    """A run on Weights & Biases; every attempt continues the same one."""

    project: str = "maxlm"
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline: kept in FOLDER/NAME/wandb for `wandb sync`; disabled: not at all."""


class ReportingConfig(Config):
    """Reports beside metrics.jsonl and events.jsonl, which every run writes."""

    tensorboard: bool = True
    """Write TensorBoard events to FOLDER/NAME/tensorboard; false: do not."""
    wandb: WandbConfig | None = None
    """Report to Weights & Biases too; null: do not."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Answer scrapes of Prometheus at this port of process 0's host; null: do not."""
    prometheus_address: str = Field(default="127.0.0.1", min_length=1)
    """Address or host name to answer at. The default answers the host itself alone; 0.0.0.0 (or ::
    for IPv6) anyone who reaches it, such as a cluster's Prometheus."""

    def check_packages(self) -> None:
        """Checks that the packages for it are here; raises MaxlmError if one is missing."""
        needed = {
            "wandb": self.wandb is not None and self.wandb.mode != "disabled",
            "prometheus_client": self.prometheus_port is not None,
        }
        for package, wanted in needed.items():
            # A folder of that name, such as wandb makes beside a script, has no origin.
            if wanted and getattr(find_spec(package), "origin", None) is None:
                setting = f"reporting.{package.replace('_client', '_port')}"
                fix = "pip install 'maxlm[reporting]', or leave the setting out"
                raise MaxlmError(f"the package {package} is not installed", where=setting, fix=fix)


class Sink:
    """Receives metrics by step, and events. The base class ignores them."""

    def log(self, step: int, values: Numbers) -> None:
        """Takes the numbers of a step."""

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        """Takes an event."""

    def rewind(self, step: int) -> None:
        """Forgets what came after ``step``."""

    def close(self) -> None:
        """Writes everything out."""


def open_sinks(config: ReportingConfig, folder: Path, resume_step: int) -> Iterator[Sink]:
    """Opens the sinks that a run asks for; raises MaxlmError.

    Args:
        folder: the run's; exists.
        resume_step: what TensorBoard has of later steps is withdrawn; 0: a new run.
    """
    config.check_packages()
    if config.prometheus_port is not None:
        yield PrometheusSink(config.prometheus_address, config.prometheus_port)
    if config.tensorboard:
        yield TensorBoardSink(folder / "tensorboard", resume_step)
    if config.wandb is not None and config.wandb.mode != "disabled":
        yield WandbSink(config.wandb, folder)


class TensorBoardSink(Sink):
    """Event files, one an attempt, written in the caller's thread: tensorboardX's own writer waits
    for ever for a thread that a full disk has ended."""

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
                config=yaml.safe_load(described.read_text()) if described.exists() else None,
                # Its process gets a job's SIGTERM as well; an upload must not hold up the exit.
                settings=wandb.Settings(console="off", silent=True, finish_timeout=15),
            )
        except wandb.Error as error:
            what = f"Weights & Biases: {error}"
            fix = "run wandb login, or set reporting.wandb.mode=offline"
            raise MaxlmError(what, where="reporting.wandb", fix=fix) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Numbers) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class PrometheusSink(Sink):
    """An HTTP endpoint with the newest value of every number: ``maxlm_step``, ``maxlm_loss``, ...;
    ``maxlm_last_step_timestamp`` (unix seconds), ``maxlm_time_seconds_total{spent=...}`` of this
    attempt (as ``progress`` events count it) and ``maxlm_events_total{event=...}``."""

    def __init__(self, address: str, port: int):
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        self._registry, self._gauges = CollectorRegistry(), {}
        self._gauge, self._spent = Gauge, dict[str, float]()
        about = {"registry": self._registry, "namespace": "maxlm"}
        self._seconds = Counter("time_seconds", "Of this attempt, by use", ["spent"], **about)
        self._events = Counter("events", "What happened in this attempt", ["event"], **about)
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
            what = f"cannot listen on {address} port {port}: {error}"
            fix = "name a free port, and an address of this host or 0.0.0.0 for all of them"
            raise MaxlmError(what, where="reporting.prometheus_port", fix=fix) from error

    def log(self, step: int, values: Numbers) -> None:
        for name, value in {**values, "step": step, "last_step_timestamp": time.time()}.items():
            name = "maxlm_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, "Its newest value", registry=self._registry)
            self._gauges[name].set(value)

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        self._events.labels(kind).inc()
        if kind == "rollback":  # ``progress`` counts anew from here.
            self._spent = {}
        if kind == "progress":
            for spent, seconds in details.items():
                self._seconds.labels(spent).inc(seconds - self._spent.get(spent, 0.0))
            self._spent = dict(details)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
