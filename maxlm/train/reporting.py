"""Reports a run's numbers to TensorBoard and Weights & Biases, beside its own files.

A sink is made for one attempt of a run, by process 0.
"""

import os
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

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

    def check_packages(self) -> None:
        """Checks that the package for it is here; raises MaxlmError if it is missing."""
        wanted = self.wandb is not None and self.wandb.mode != "disabled"
        # A folder of that name, such as wandb makes beside a script, has no origin.
        if wanted and getattr(find_spec("wandb"), "origin", None) is None:
            what, fix = "the package wandb is not installed", "pip install 'maxlm[reporting]'"
            raise MaxlmError(what, where="reporting.wandb", fix=f"{fix}, or leave the setting out")


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
