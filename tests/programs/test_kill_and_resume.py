"""A run that is killed at random moments ends, bit for bit, like one that never was; its loader's
worker processes go with it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import tiny


@pytest.mark.timeout(900)
def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    text = tiny.write_text(tmp_path / "text", documents=40)
    options = ["--steps", "30", "--every", "5", "--kills", "3", "--seed", "1", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, script, *options, "--text", text, "--folder", tmp_path / "runs"],
        capture_output=True,
        text=True,
        env=tiny.environment(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"│ (arrays|metrics|records).*│ (\w+) +│$", done.stdout, re.M) == [
        ("arrays", "none"),
        ("metrics", "none"),
        ("records", "none"),
    ]
    assert len(re.findall(r"^killed: ", done.stdout, re.M)) == 3
