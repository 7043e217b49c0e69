"""`maxlm train` on hosts that are processes of this machine, watched from outside to be
killed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WITNESS = Path(__file__).with_name("witness.py")
PATIENCE = 300.0
POLL = 0.002


@dataclass(frozen=True)
class Layout:
    """Where a run is trained."""

    hosts: int
    devices: int
    """Of each host."""
    data: int
    fsdp: int

    def __str__(self) -> str:
        mesh = f"data={self.data}" if self.data > 1 else f"fsdp={self.fsdp}"
        return f"{self.hosts} x {self.devices}, {mesh}"


@dataclass(frozen=True)
class TortureJob:
    """Where the runs of all campaigns lie."""

    folder: Path
    steps: int

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def seen(self, name: str) -> Path:
        return self.folder / "seen" / name

    def remote(self, name: str) -> Path:
        return self.folder / "remote" / name


class HostAttempt:
    """The processes of one start, each leading a process group of its own."""

    def __init__(self, job: TortureJob, name: str, layout: Layout):
        self.run = job.run(name)
        self.name = name
        self.remote = job.remote(name)
        self._locals = job.folder / "local"
        self.before = len(starts(self.run))
        self._lock = changed(self.run / "lock")
        job.seen(name).mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        coordinator = f"127.0.0.1:{free_port()}"
        hosts = range(layout.hosts)
        self.processes = [
            self._start(job, layout, number, coordinator) for number in hosts
        ]

    def _start(
        self, job: TortureJob, layout: Layout, number: int, coordinator: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, WITNESS, job.seen(self.name), "train"]
        command += [job.folder / "config.yaml", f"name={self.name}"]
        command += [f"mesh.data={layout.data}", f"mesh.fsdp={layout.fsdp}"]
        # Workers cost half a start; that none outlives its host shows on one.
        command += [f"data.workers={int(layout.hosts == 1)}"]
        environment = {
            **os.environ,
            "MAXLM_COORDINATOR": coordinator,
            "MAXLM_NUM_PROCESSES": str(layout.hosts),
            "MAXLM_PROCESS_ID": str(number),
            "JAX_NUM_CPU_DEVICES": str(layout.devices),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            # with fewer threads, devices may wait for each other for good
            "PJRT_NPROC": "16",
        }
        with (job.folder / f"{self.name}-{number}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def restoring(self) -> bool:
        """Whether it has come so far; the folder is locked just before."""
        return changed(self.run / "lock") != self._lock

    def training(self) -> bool:
        return self.went_on() is not None

    def went_on(self) -> dict[str, Any] | None:
        """The event with which training began or went on."""
        return next(iter(starts(self.run)[self.before :]), None)

    def saving(self) -> bool:
        """Orbax's folder has a temporary name until it is complete."""
        folder = self.run / "checkpoints"
        return any("tmp" in path.name for path in listed(folder))

    def saving_local(self) -> bool:
        """Files are written in a hidden folder of their process's, until they are
        complete."""
        runs = [
            run for run in listed(self._locals) if run.name.startswith(f"{self.name}-")
        ]
        folders = [
            path for run in runs for host in listed(run) for path in listed(host)
        ]
        return any(listed(path) for path in folders if path.name.startswith("."))

    def copying(self) -> bool:
        """The newest copy that was begun is not complete."""
        begun = [
            path for path in listed(self.remote) if path.name.isdigit() and listed(path)
        ]
        newest = max(begun, key=lambda path: int(path.name), default=None)
        return newest is not None and not (newest / "COMPLETE").exists()

    def during(self) -> str:
        """What is under way."""
        if not self.training():
            return "restore" if self.restoring() else "start-up"
        kinds = {
            "save": self.saving,
            "local save": self.saving_local,
            "copy": self.copying,
        }
        return next((name for name, under_way in kinds.items() if under_way()), "step")

    def until(self, happened: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Whether it has happened before a process has ended, or the time was over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(POLL)
        return happened()

    def said_done(self) -> bool:
        """Whether the run has written down that it is at its end."""
        last = json.loads((lines(self.run / "events.jsonl") or [b"{}"])[-1])
        return last.get("event") == "stop" and last.get("reason") == "done"

    def done(self) -> bool:
        return all(process.poll() == 0 for process in self.processes)

    def orphans(self) -> bool:
        """Whether anything is left half a minute after the last process has ended."""
        deadline = time.monotonic() + 30
        while left := any(alive(process.pid) for process in self.processes):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        return left


@contextmanager
def started(job: TortureJob, name: str, layout: Layout) -> Iterator[HostAttempt]:
    """Nothing of it is left behind."""
    attempt = HostAttempt(job, name, layout)
    try:
        yield attempt
    finally:
        for process in attempt.processes:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Not one that Linux gives to connections, which may come before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_240, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def alive(group: int) -> bool:
    """Whether the process group has a living member; where there is no /proc, also a
    dead one."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc/self/stat").exists():
        return True
    return any(
        living_group(stat) == group for stat in Path("/proc").glob("[0-9]*/stat")
    )


def living_group(stat: Path) -> int | None:
    """The group of a process that is no zombie."""
    try:
        state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)


def changed(path: Path) -> int:
    """When a file was, 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def listed(folder: Path) -> list[Path]:
    """What is in a folder that may be gone any moment."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def starts(run: Path) -> list[dict[str, Any]]:
    """The events with which training has begun or gone on."""
    event_lines = lines(run / "events.jsonl")
    return [json.loads(e) for e in event_lines if b'"start"' in e or b'"resume"' in e]


def last_step(run: Path) -> int:
    """The last one recorded, 0 if there is none."""
    records = lines(run / "metrics.jsonl")
    return json.loads(records[-1])["step"] if records else 0


def lines(path: Path) -> list[bytes]:
    """The complete lines of a file that may be growing, or not be there yet."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
