"""``maxlm train`` as processes of their own: told things, killed, and asked how they ended."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.train.records import read_records
from tests.ports import free_port
from tests.programs import tiny

WORKER = Path(__file__).with_name("faults_worker.py")
HERE = socket.gethostname()
SAME = ("loss", "grad_norm", "param_norm", "update_norm", "eval_loss", "tokens")


class Process:
    """One process; ``ended`` waits for it."""

    def __init__(self, command: Sequence[Any], log: Path, environment: Mapping[str, str]):
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err, env=dict(environment)
            )
        self.id = self._process.pid

    def send(self, signum: int) -> None:
        self._process.send_signal(signum)

    def ended(self, seconds: float = 600) -> tuple[int, list[str], list[str]]:
        """Its exit code and the lines that it wrote, on stdout and on stderr."""
        code = self._process.wait(seconds)
        return code, self.out.read_text().splitlines(), self.err.read_text().splitlines()

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
    """Starts runs of one config; none outlives the test.

    Args:
        logs: a folder for what they write to stdout and stderr, and for what is compiled.
        runs: a folder for theirs; default: the same.
    """

    def __init__(self, logs: Path, config: str, *settings: str, runs: Path | None = None):
        self.logs, self.folder, self._config = logs, runs or logs, config
        self._settings = (f"folder={self.folder}", *settings)
        self._started: list[Process] = []

    def elsewhere(self, runs: Path) -> "Jobs":
        """The same, with the runs in another folder."""
        return Jobs(self.logs, self._config, *self._settings[1:], runs=runs)

    def train(
        self,
        name: str,
        *settings: str,
        processes: int = 1,
        devices: int = 1,
        faults: Mapping[int, tuple[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        own: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Process]:
        """Start ``maxlm train`` on the hosts of a cluster, or on one.

        Args:
            devices: of each process.
            faults: of a process by its number, (what, where): see ``faults_worker.py``.
            own: settings of one process alone, by its number.
        """
        arguments = ["train", self._config, f"name={name}", *self._settings, *settings]
        port, begun = free_port(), []
        for number in range(processes):
            cluster = {
                "MAXLM_COORDINATOR": f"127.0.0.1:{port}",
                "MAXLM_NUM_PROCESSES": str(processes),
                "MAXLM_PROCESS_ID": str(number),
                "JAX_NUM_CPU_DEVICES": str(devices),
            }
            fault = (faults or {}).get(number)
            program = [WORKER, *fault] if fault else ["-m", "maxlm.cli.main"]
            log = self.logs / f"{name}-{len(self._started)}"
            command = [sys.executable, *program, *arguments, *(own or {}).get(number, ())]
            variables = tiny.environment(self.logs) | cluster | dict(environment or {})
            begun.append(Process(command, log, variables))
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
        return max((record["step"] for record in self.records(name)), default=0)

    def records(self, name: str) -> list[dict[str, Any]]:
        return list(read_records(self.folder / name / "metrics.jsonl"))

    def results(self, name: str) -> list[tuple[int, dict[str, float]]]:
        """What must not depend on how a run got there."""
        return [(r["step"], {k: r[k] for k in SAME if k in r}) for r in self.records(name)]

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] in kinds]

    def end(self) -> None:
        for process in self._started:
            process.end()
