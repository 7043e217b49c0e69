"""Ray nodes on loopback, of which some are killed, and an engine that counts what they
begin."""

import itertools
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_SECONDS = 120
_REPLACE = os.replace
_MAXLM = Path(__file__).parents[2]


@dataclass(frozen=True)
class RayHead:
    """The head node of a cluster."""

    port: int
    client_port: int

    @property
    def client_address(self) -> str:
        return f"ray://127.0.0.1:{self.client_port}"


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert process.poll() is None, "the node ended"
        assert time.monotonic() < deadline, "the node does not start"
        time.sleep(0.05)


def wait_until_joined(process: subprocess.Popen, log: Path) -> None:
    """Waits until a node is part of its cluster, which its log says.

    Raises:
      AssertionError: the node ended, or takes longer than `_SECONDS`.
    """
    wait_for(lambda: b"runtime started" in log.read_bytes(), process)


@contextmanager
def start_node(
    log: Path, *options: str, **environment: str
) -> Iterator[subprocess.Popen]:
    """`ray start --block` with one CPU, which is killed at the end."""
    command = [
        sys.executable,
        "-c",
        "from ray.scripts.scripts import main; main()",
        "start",
    ]
    command += ["--block", "--num-cpus=1", "--object-store-memory=80000000", *options]
    command += [
        "--node-ip-address=127.0.0.1",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    path = os.pathsep.join([str(_MAXLM), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    # Else a token in the home folder, which any local cluster leaves, would be asked of
    # clients.
    environment |= {"RAY_AUTH_MODE": "disabled"}
    # The server for a client starts by a fork, in which gRPC's own handler may end it;
    # and on a busy machine it takes longer than Ray's half minute.
    environment |= {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    environment |= {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": str(_SECONDS)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        kill_node(process)


def kill_node(process: subprocess.Popen) -> None:
    """Kills all processes of a node at once, as a power cut does."""
    if process.poll() is None:
        # Not by its group: the workers have groups of their own.
        node = psutil.Process(process.pid)
        for member in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


@contextmanager
def start_head(folder: Path) -> Iterator[RayHead]:
    """Starts a head node; `folder`: of a short name, for its sockets."""
    head = RayHead(find_free_port(), find_free_port())
    with ExitStack() as stack:
        process = stack.enter_context(
            start_node(
                folder / "head.log",
                "--head",
                f"--port={head.port}",
                f"--ray-client-server-port={head.client_port}",
                "--include-dashboard=false",
                f"--temp-dir={folder}",
            )
        )
        wait_until_joined(process, folder / "head.log")
        wait_for(lambda: listens(head.client_port), process)
        yield head


class CountedTasks:
    """An engine that notes every task that begins, those that are run again too.

    On a node with DOOMED in its environment, tasks of the function `doomed` never come
    past the second file that they write: it stays under its temporary name. Other nodes
    begin no such task before that.
    """

    def __init__(self, executor: Any, notes: Path, doomed: str):
        self._executor = executor
        self._notes = notes
        self._doomed = doomed
        self.num_jobs = 0

    @property
    def num_begun(self) -> int:
        return len(list(self._notes.glob("begun-*")))

    def require_on_workers(self, shared_folder: Path, packages: Sequence[str]) -> None:
        self._executor.require_on_workers(shared_folder, packages)

    def map_unordered(self, function: Callable, jobs: Sequence[Any]) -> Iterator[Any]:
        self.num_jobs += len(jobs)
        name = getattr(
            getattr(function, "func", function), "__name__", type(function).__name__
        )
        is_doomed = name == self._doomed
        return self._executor.map_unordered(
            NotedTask(function, self._notes, is_doomed), jobs
        )


class NotedTask:
    """See `CountedTasks`."""

    def __init__(self, function: Callable, notes: Path, is_doomed: bool):
        self._function = function
        self._notes = notes
        self._is_doomed = is_doomed

    def __call__(self, job: Any) -> Any:
        (self._notes / f"begun-{uuid.uuid4().hex}").touch()
        stuck = self._notes / "stuck"
        if self._is_doomed and "DOOMED" not in os.environ:
            deadline = time.monotonic() + _SECONDS
            while not stuck.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        elif self._is_doomed and os.replace is _REPLACE:
            files = itertools.count(1)

            def replace_first(source: Path, target: Path) -> None:
                if next(files) > 1:
                    stuck.touch()
                    time.sleep(2 * _SECONDS)
                _REPLACE(source, target)

            os.replace = replace_first
        return self._function(job)
