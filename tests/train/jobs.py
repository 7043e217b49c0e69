"""``maxlm train`` as processes of their own: told things, killed, and asked how they
ended."""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.train import tiny

WORKER = Path(__file__).with_name("faults_worker.py")
HERE = socket.gethostname()


class Process:
    """One process; ``ended`` waits for it."""

    def __init__(
        self, command: Sequence[Any], log: Path, environment: Mapping[str, str]
    ):
        self.out = log.with_suffix(".out")
        self.err = log.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err, env=dict(environment)
            )
        self.id = self._process.pid
        self.send = self._process.send_signal

    def ended(self, seconds: float = 600) -> tuple[int, list[str], list[str]]:
        """Its exit code and the lines that it wrote, on stdout and on stderr."""
        code = self._process.wait(seconds)
        out = self.out.read_text().splitlines()
        err = self.err.read_text().splitlines()
        return code, out, err

    def until(self, condition: Any, seconds: float = 600) -> None:
        """Look on until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.005)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Jobs:
    """Starts runs of one config, each in a folder of its own in ``folder``; none
    outlives the test. What they write to stdout and stderr, and what is compiled, lies
    there too.

    Args:
        command: of ``maxlm``.
        worker: the program that runs it, as ``faults_worker.py`` does.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        command: str = "train",
        worker: Path = WORKER,
    ):
        self.folder = folder
        self._config = config
        self._command = command
        self._worker = worker
        self._started: list[Process] = []

    def train(
        self,
        name: str,
        *settings: str,
        processes: int = 1,
        devices: int = 1,
        faults: Mapping[int, tuple[str, Any]] | None = None,
        process_settings: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Process]:
        """Start ``maxlm train`` on the hosts of a cluster, or on one.

        Args:
            devices: of each process.
            faults: of a process by its number, (what, where): see ``faults_worker.py``.
            process_settings: settings of one process alone, by its number.
        """
        arguments = [self._command, self._config, f"name={name}", *settings]
        port = free_port()
        faults = faults or {}
        process_settings = process_settings or {}
        environment = tiny.environment(self.folder)
        begun = []
        for number in range(processes):
            cluster = {
                "MAXLM_COORDINATOR": f"127.0.0.1:{port}",
                "MAXLM_NUM_PROCESSES": str(processes),
                "MAXLM_PROCESS_ID": str(number),
                "JAX_NUM_CPU_DEVICES": str(devices),
            }
            fault = faults.get(number, ("none", 0))
            command = [
                sys.executable,
                self._worker,
                *fault,
                *arguments,
                *process_settings.get(number, ()),
            ]
            log = self.folder / f"{name}-{len(self._started)}"
            process = Process(command, log, environment | cluster)
            begun.append(process)
            self._started.append(process)
        return begun

    def trained(
        self, name: str, *settings: str, processes: int = 1, devices: int = 1
    ) -> list[str]:
        """Train to the end; what process 0 wrote to stdout."""
        begun = self.train(name, *settings, processes=processes, devices=devices)
        ended = [process.ended() for process in begun]
        for code, _, err in ended:
            assert code == 0, "\n".join(err)
        _, out, _ = ended[0]
        return out

    def step(self, name: str) -> int:
        """The newest that is on record."""
        records = tiny.read_metrics(self.folder / name)
        return max((record["step"] for record in records), default=0)

    def end(self) -> None:
        for process in self._started:
            process.end()
