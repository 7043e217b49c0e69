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

STEPS = 220
EVERY = 200  # Steps between checkpoints. Seconds pass until a job is told to stop.


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
    if not path.exists():
        return []
    # The last line may be half written.
    lines = path.read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record["step"] for record in records if "loss" in record]


class SlurmJob:
    """The one that `maxlm launch slurm` prints for a run on two hosts, submitted."""

    def __init__(self, scheduler: Mapping[str, str], config: Path, name: str):
        self.scheduler = scheduler
        self.name = name
        self.run = config.parent / name
        self.environ = tiny.environment(config.parent) | dict(scheduler)
        self.script = config.parent / f"{name}.sbatch"
        program = str(Path(sys.executable).with_name("maxlm"))
        command = [program, "launch", "slurm", str(config), f"name={name}"]
        command += ["--on", "cpux2", "--nodes", "2", "--maxlm", program]
        command += ["--out", str(self.script)]
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
        unfinished = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        status = scontrol(self.scheduler, self.number)
        while status["JobState"] in unfinished:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)
            status = scontrol(self.scheduler, self.number)
        return status


@pytest.mark.timeout(600)
def test_a_preempted_job_ends_like_an_unbroken_one(scheduler, tmp_path):
    compare = runpy.run_path(str(tiny.ROOT / "benchmarks" / "same_run.py"))["compare"]
    train = {"steps": STEPS, "ema_decay": 0.9, "eval_every": 80, "eval_batches": 1}
    checkpoint = {"every_steps": EVERY}
    text = tiny.write_text(tmp_path / "text", documents=40)
    config = Path(tiny.write_config(tmp_path, text, train=train, checkpoint=checkpoint))
    unbroken = SlurmJob(scheduler, config, "unbroken")
    status = unbroken.end()
    assert (status["JobState"], status["Restarts"]) == ("COMPLETED", "0"), (
        unbroken.text()
    )
    broken = SlurmJob(scheduler, config, "broken")
    broken.wait_for_step(5)
    broken.preempt()
    status = broken.end()
    assert (status["JobState"], status["Restarts"]) == ("COMPLETED", "1"), broken.text()
    # Saved when it was told, not at the checkpoint that was due only later; no step
    # taken twice.
    assert steps(broken.run) == list(range(1, STEPS + 1))
    lines = (broken.run / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    (resumed_step,) = (event["step"] for event in events if event["event"] == "resume")
    assert 5 <= resumed_step < EVERY
    comparisons = compare(unbroken.run, broken.run, STEPS)
    assert not any(comparison.wrong for comparison in comparisons), comparisons
