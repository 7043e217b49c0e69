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
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err, env=dict(environment)
            )
        self.id, self.send = self._process.pid, self._process.send_signal

    def ended(self, seconds: float = 600) -> tuple[int, list[str], list[str]]:
        """Its exit code and the lines that it wrote, on stdout and on stderr."""
        code = self._process.wait(seconds)
        return (
            code,
            self.out.read_text().splitlines(),
            self.err.read_text().splitlines(),
        )

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
    there too."""

    def __init__(self, folder: Path, config: str):
        self.folder, self._config = folder, config
        self._started: list[Process] = []

    def train(
        self,
        name: str,
        *settings: str,
        processes: int = 1,
        devices: int = 1,
        faults: Mapping[int, tuple[str, Any]] | None = None,
        own: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Process]:
        """Start ``maxlm train`` on the hosts of a cluster, or on one.

        Args:
            devices: of each process.
            faults: of a process by its number, (what, where): see ``faults_worker.py``.
            own: settings of one process alone, by its number.
        """
        arguments = ["train", self._config, f"name={name}", *settings]
        port = free_port()
        begun = []
        for number in range(processes):
            cluster = {
                "MAXLM_COORDINATOR": f"127.0.0.1:{port}",
                "MAXLM_NUM_PROCESSES": str(processes),
                "MAXLM_PROCESS_ID": str(number),
                "JAX_NUM_CPU_DEVICES": str(devices),
            }
            program = [WORKER, *(faults or {}).get(number, ("none", 0))]
            log = self.folder / f"{name}-{len(self._started)}"
            command = [
                sys.executable,
                *program,
                *arguments,
                *(own or {}).get(number, ()),
            ]
            begun.append(Process(command, log, tiny.environment(self.folder) | cluster))
            self._started.append(begun[-1])
        return begun

    def trained(self, name: str, *settings: str, **how: Any) -> list[str]:
        """Train to the end; what process 0 said."""
        ended = [process.ended() for process in self.train(name, *settings, **how)]
        for code, _, err in ended:
            assert code == 0, "\n".join(err)
        return ended[0][1]

    def step(self, name: str) -> int:
        """The newest that is on record."""
        return max(
            (r["step"] for r in tiny.read_metrics(self.folder / name)), default=0
        )

    def end(self) -> None:
        for process in self._started:
            process.end()
