"""A run's folder: created, locked against a second run, described, and closed with a reason."""

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from maxlm.config import MaxlmError, to_yaml
from maxlm.plan.predict import RunPlan
from maxlm.programs.environment import describe_environment
from maxlm.run import RunConfig
from maxlm.runtime.files import check_not_deleted, convert_write_errors, lock_folder, replace_file
from maxlm.runtime.signals import SignalHandler
from maxlm.train.records import MetricsLog


def run_folder_path(config: RunConfig) -> Path:
    """Returns the folder that a run is kept in."""
    return Path(config.folder) / config.name


@contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Creates a folder for the block, and removes it if it is empty in the end."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MaxlmError(
            f"cannot write the run folder ({error.strerror})",
            where=str(folder),
            fix="set folder=PATH to a place you may write to",
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Not empty.
            for path in created:
                path.rmdir()


@contextmanager
def create_run_folder(config: RunConfig, folder: Path, *, lead: bool = True) -> Iterator[None]:
    """Creates a run's folder, with its config, for text to be prepared in; removes it if the block
    fails before anything was written. The config is there even if the block is killed.

    Args:
        lead: whether this process is the one that writes.
    """
    path = folder / "config.yaml"
    with create_folder(folder):
        is_new = lead and not path.exists()
        if is_new:
            with replace_file(path) as temporary:
                temporary.write_text(to_yaml(config))
        try:
            yield
        except MaxlmError:
            if lead:
                with suppress(OSError):  # Not empty, or not there.
                    (folder / "checkpoints").rmdir()
            if is_new and {each.name for each in folder.iterdir()} <= {"lock", path.name}:
                path.unlink()
            raise


@contextmanager
def lock_run_folder(folder: Path, *, lead: bool = True) -> Iterator[None]:
    """Holds the run's folder against other runs, which would ruin it; on processes that do not lead
    does nothing.

    Raises:
        MaxlmError: another process holds it; something failed, and the folder is gone.
    """
    if not lead:
        yield
        return
    note = folder / "lock"
    with ExitStack() as stack:
        stack.enter_context(create_folder(folder))
        try:
            stack.enter_context(lock_folder(folder))
        except MaxlmError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            holder = "unknown"
            with suppress(OSError):  # It ends just now.
                holder = " ".join(note.read_text().split()) or holder
            what = f"another run writes to this folder ({holder})"
            fix = "wait for it to end, stop it, or give this one another name=..."
            raise MaxlmError(what, where=str(folder), fix=fix) from error
        with convert_write_errors(note):
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        except Exception:
            if not note.exists():  # Whatever failed, that is why.
                check_not_deleted(folder / "config.yaml")
            raise
        finally:
            note.unlink(missing_ok=True)


def describe_run(folder: Path, config: RunConfig, plan: RunPlan, *, lead: bool) -> None:
    """Writes what another person needs to judge the run, or to run it again: its config, plan and
    environment. All processes call it together; the one that leads writes."""
    values = {"plan.json": plan.to_json(), "environment.json": describe_environment()}
    texts = {name: f"{json.dumps(value, indent=2)}\n" for name, value in values.items()}
    texts["config.yaml"] = to_yaml(config)
    for name, text in texts.items() if lead else ():
        with replace_file(folder / name) as temporary:
            temporary.write_text(text)


@contextmanager
def record_stop(signals: SignalHandler, log: MetricsLog, step: int) -> Iterator[None]:
    """Writes a ``stop`` event for an error that ends the block, unless there is one already."""
    try:
        yield
    except BaseException as error:
        if not log.stopped:
            reason = "interrupt" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(MaxlmError):  # a full disk, perhaps, which is what `error` says
                log.event("stop", step, reason="preempted" if signals.interrupted_work else reason)
        raise
