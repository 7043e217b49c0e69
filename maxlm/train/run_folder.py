"""A run's folder: created, locked against a second run, described, and closed with a
reason."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import maxlm
from maxlm.config import MaxlmError
from maxlm.config.show import to_yaml
from maxlm.data.batch_source import BatchSource, RefusesRows
from maxlm.run.config import RunConfig
from maxlm.runtime.collectives import all_gather_json
from maxlm.runtime.files import (
    check_run_not_moved,
    convert_write_errors,
    lock_folder,
    replace_file,
)
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.signals import SignalHandler
from maxlm.train.records import MetricsLog

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "numpy",
)
# What changes how programs are compiled or run, and what a scheduler calls the job:
# never a variable that may hold a secret.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "TPU_NAME",
    "TPU_ACCELERATOR_TYPE",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST",
    "JOBSET_NAME",
    "JOBSET_RESTART_ATTEMPT",
    "RAY_JOB_ID",
    "SKYPILOT_TASK_ID",
)

if TYPE_CHECKING:
    from maxlm.plan.predict import RunPlan


@contextmanager
def create_run_folder(
    config: RunConfig, folder: Path, *, is_lead: bool = True
) -> Iterator[None]:
    """Creates a run's folder, with its config, for the block; removes it if the block
    fails before anything else was written. Only the process that leads writes."""
    path = folder / "config.yaml"
    created = [
        directory for directory in (folder, *folder.parents) if not directory.exists()
    ]
    is_new = is_lead and not path.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            with replace_file(path) as temporary:
                temporary.write_text(to_yaml(config))
    except OSError as error:
        message = f"cannot write the run folder ({error.strerror})"
        fix = "set folder=PATH to a place you may write to"
        raise MaxlmError(message, where=str(folder), fix=fix) from error
    try:
        yield
    except MaxlmError:
        with suppress(OSError):  # Not empty, or not there.
            if is_lead:
                (folder / "checkpoints").rmdir()
        if is_new and [*folder.glob("*")] == [path]:
            path.unlink()
        raise
    finally:
        with suppress(OSError):  # Not empty.
            for directory in created:
                directory.rmdir()


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Holds the run's folder against other runs, which would ruin it. Whatever fails in
    the block, the error is that the folder is gone if it is."""
    note = folder / "lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except MaxlmError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            holder = "unknown"
            with suppress(OSError):  # It ends just now.
                holder = " ".join(note.read_text().split()) or holder
            message = f"another run writes to this folder ({holder})"
            fix = "wait for it to end, stop it, or give this one another name=..."
            raise MaxlmError(message, where=str(folder), fix=fix) from error
        with convert_write_errors(note):
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        except Exception:
            # Whatever failed, a folder that is gone is why.
            if not note.exists():
                check_run_not_moved(folder / "config.yaml")
            raise
        finally:
            note.unlink(missing_ok=True)


def write_run_description(
    folder: Path, config: RunConfig, plan: "RunPlan", *, is_lead: bool
) -> None:
    """Writes what another person needs to judge the run, or to run it again: its
    config, plan and environment. All processes call it together; the one that leads
    writes."""
    environment = describe_environment()
    if not is_lead:
        return
    texts = {
        "plan.json": f"{json.dumps(plan.to_json(), indent=2)}\n",
        "environment.json": f"{json.dumps(environment, indent=2)}\n",
        "config.yaml": to_yaml(config),
    }
    for name, text in texts.items():
        with replace_file(folder / name) as temporary:
            temporary.write_text(text)


def write_refused_rows(folder: Path, sources: Mapping[str, BatchSource]) -> None:
    """Writes ``refused_rows.jsonl``: place, fault and remedy of each row that a run's
    batch sources leave out because it cannot be read or learnt. No such row: no
    file."""
    lines = []
    for name, source in sources.items():
        errors = source.refused if isinstance(source, RefusesRows) else ()
        for error in errors:
            record = {
                "rows": name,
                "where": error.where,
                "fault": error.message,
                "fix": error.fix,
            }
            lines.append(f"{json.dumps(record)}\n")
    if lines:
        with replace_file(folder / "refused_rows.jsonl") as temporary:
            temporary.write_text("".join(lines), "utf-8")


@contextmanager
def record_stop_on_error(
    signals: SignalHandler, log: MetricsLog, step: int
) -> Iterator[None]:
    """Writes a ``stop`` event for an error that ends the block, unless there is one
    already."""
    try:
        yield
    except BaseException as error:
        # Whatever ends the attempt, an interrupt too, is recorded and raised again.
        if not log.stopped:
            if signals.interrupted_work:
                reason = "preempted"
            elif isinstance(error, KeyboardInterrupt):
                reason = "interrupt"
            else:
                reason = "failed"
            # The disk may be full, which is then what `error` says.
            with suppress(MaxlmError):
                log.event("stop", step, reason=reason)
        raise


def describe_environment() -> JsonObject:
    """Returns plain data for ``environment.json``, ``git`` None for a source that is no
    checkout. All processes call it together."""
    device = jax.devices()[0]
    versions = {name: version(name) for name in PACKAGES}
    return {
        "maxlm": maxlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions | {device.platform: device.client.platform_version},
        "git": read_git_state(Path(maxlm.__file__).parents[1]),
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "hosts": all_gather_json(platform.node()),
        "variables": {
            name: os.environ[name] for name in VARIABLES if name in os.environ
        },
    }


def read_git_state(root: Path) -> JsonObject | None:
    """The commit that a source tree is at, and whether it differs.

    None: not a checkout, or no git. An installed package may lie inside another
    project's checkout, which does not track it.
    """
    if _git(root, "ls-files", "--error-unmatch", "maxlm/__init__.py") is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain")
    if commit is None or status is None:
        return None
    return {"commit": commit.decode().strip(), "dirty": bool(status)}


def get_process_start_unix_seconds() -> float:
    """Returns the unix seconds when this process was started; now, where nothing
    says."""
    if sys.platform != "linux":  # no /proc, and no CLOCK_BOOTTIME
        return time.time()
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return time.time()
    # Behind the name, which may hold anything but ")": the 22nd field, in clock ticks
    # since the machine was booted (proc(5)).
    _, _, fields = stat.rpartition(")")
    start_ticks = int(fields.split()[19])
    start_seconds = start_ticks / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_seconds
    return time.time() - max(0.0, age)


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        # What was only touched is not noted in the index: its lock is for who works
        # there.
        command = ["git", "--no-optional-locks", "-C", root, *arguments]
        process = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout if process.returncode == 0 else None
