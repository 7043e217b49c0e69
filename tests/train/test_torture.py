"""A run whose processes are killed at random moments, on one host, on two, and on
changing meshes, ends like one that never was."""

import os
import re
import subprocess
import sys

import pytest

from tests.train import tiny

KILLS, STEPS = 10, 30


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_killed_ten_times_end_like_unbroken_ones(tmp_path):
    folder = tmp_path / "tortured"
    text = tiny.write_text(tmp_path / "text", documents=40)
    options = [
        "--kills",
        KILLS,
        "--steps",
        STEPS,
        "--seed",
        1,
        "--text",
        text,
        "--folder",
        folder,
    ]
    done = subprocess.run(
        [sys.executable, tiny.ROOT / "benchmarks/torture.py", *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} kills, 0 of which ended wrong" in done.stdout
    compared = re.findall(r"^│ (\w+) +│ (\w+)[^│]*│[^│]*│ (\w+) +│$", done.stdout, re.M)
    same = ("arrays", "records", "metadata", "steps", "batches", "files", "litter")
    near = ("arrays", "losses", "steps", "batches", "files", "litter")
    assert compared == [
        *[(campaign, part, "no") for campaign in ("one", "two") for part in same],
        *[("changing", part, "no") for part in near],
    ]
