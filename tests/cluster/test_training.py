"""On a real SLURM, the job that `maxlm launch` prints trains, is preempted, and ends as
if it never had been."""

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.train import tiny

STEPS, EVERY = 220, 200  # seconds pass until a job is told


def scontrol(scheduler: Mapping[str, str], job: str) -> dict[str, str]:
    """What SLURM says of a job."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    done = subprocess.run(
        command, env=scheduler, capture_output=True, text=True, check=True
    )
    pairs = (word.partition("=") for word in done.stdout.split())
    return {name: value for name, _, value in pairs}


def steps(run: Path) -> list[int]:
    """Those recorded, as often as they are."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["step"] for line in lines if "loss" in (record := json.loads(line))]


class Job:
    """The one that `maxlm launch slurm` prints for a run on two hosts, submitted."""

    def __init__(self, scheduler: Mapping[str, str], config: Path, name: str):
        self.scheduler = scheduler
        self.name = name
        self.run = config.parent / name
        self.environ = tiny.environment(config.parent) | dict(scheduler)
        self.script = config.parent / f"{name}.sbatch"
        program = str(Path(sys.executable).with_name("maxlm"))
        command = [
            program,
            "launch",
            "slurm",
            str(config),
            f"name={name}",
            "--on",
            "cpux2",
        ]
        command += ["--nodes", "2", "--maxlm", program, "--out", str(self.script)]
        self._run(command)
        self.number = self._run(["sbatch", "--parsable", str(self.script)]).strip()

    def _run(self, command: list[str]) -> str:
        where = self.script.parent
        done = subprocess.run(
            command,
            env=self.environ,
            cwd=where,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def preempt(self) -> None:
        self._run(["scancel", "--signal=USR1", self.number])

    def text(self) -> str:
        return (self.script.parent / f"{self.name}-{self.number}.out").read_text()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while step not in steps(self.run):
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def end(self) -> dict[str, str]:
        deadline = time.monotonic() + 600
        while (said := scontrol(self.scheduler, self.number))["JobState"] in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
        ):
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)
        return said


@pytest.mark.timeout(600)
def test_a_preempted_job_ends_like_an_unbroken_one(scheduler, tmp_path):
    compare = runpy.run_path(str(tiny.ROOT / "benchmarks" / "same_run.py"))["compare"]
    train = {"steps": STEPS, "ema_decay": 0.9, "eval_every": 80, "eval_batches": 1}
    checkpoint = {"every_steps": EVERY}
    text = tiny.write_text(tmp_path / "text", documents=40)
    config = Path(tiny.write_config(tmp_path, text, train=train, checkpoint=checkpoint))
    unbroken = Job(scheduler, config, "unbroken")
    said = unbroken.end()
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "0"), unbroken.text()
    broken = Job(scheduler, config, "broken")
    broken.wait_for_step(5)
    broken.preempt()
    said = broken.end()
    assert (said["JobState"], said["Restarts"]) == ("COMPLETED", "1"), broken.text()
    # Saved when it was told, not at the checkpoint that was due only later; no step
    # taken twice.
    assert steps(broken.run) == list(range(1, STEPS + 1))
    events = [
        json.loads(line)
        for line in (broken.run / "events.jsonl").read_text().splitlines()
    ]
    (resumed,) = (event["step"] for event in events if event["event"] == "resume")
    assert 5 <= resumed < EVERY
    compared = compare(unbroken.run, broken.run, STEPS)
    assert not any(each.wrong for each in compared), compared
