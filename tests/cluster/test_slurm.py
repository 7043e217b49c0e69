"""On a real SLURM, processes find each other by what srun tells them."""

import subprocess
import sys
import time
from pathlib import Path

from tests.programs import tiny
from tests.runtime import peers_worker

PARTS = [sys.executable, str(Path(peers_worker.__file__))]


def test_a_killed_task_ends_the_other(scheduler, tmp_path):
    """The other says who is gone, on which host, and which state is left; srun ends with 137."""
    marks = [tmp_path / "0", tmp_path / "1"]
    script = 'exec > "$1/$SLURM_PROCID" 2>&1; shift; echo $$; exec "$@"'
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command += ["bash", "-c", script, "-", str(tmp_path), *PARTS, "loop"]
    environ = tiny.environment(tmp_path) | dict(scheduler)
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as step:
        deadline = time.monotonic() + 300
        while not all(mark.exists() and "of 2: 3" in mark.read_text() for mark in marks):
            assert step.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run(["kill", "-9", marks[1].read_text().split()[0]], check=True)
        assert step.wait(20) == 137
    last = marks[0].read_text().splitlines()[-1]
    assert last.startswith("error: process 1 (")
    assert last.endswith(") is gone; the state is that of the last checkpoint")
