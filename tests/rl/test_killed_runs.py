"""Promise: a run of ``maxlm rl`` that is killed anywhere and resumed is the same run to
the last bit, also where samples are under way."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rl import policy_runs
from tests.rl.killed_run import PLACES
from tests.train import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return policy_runs.prepare(tmp_path_factory.mktemp("parts"))


def run_process(path: str, *place_and_count: str, folder: Path) -> None:
    """Trains in another process, which is killed at a place."""
    command = [sys.executable, "-m", "tests.rl.killed_run", path, *place_and_count]
    process = subprocess.run(command, env=tiny.environment(folder), check=False)
    assert process.returncode == (-9 if place_and_count else 0), place_and_count


def test_a_run_that_is_killed_anywhere_is_the_same(tmp_path, parts):
    """Killed at every place, one after the other, on the way."""
    settings = {"rollouts": {"staleness": 2}, "epochs": 2}
    longer = parts | {"train": {"steps": 20}}
    straight = policy_runs.write_config(tmp_path / "a", longer, **settings)
    run_process(straight, folder=tmp_path)
    expected = policy_runs.read_run(tmp_path / "a")
    killed = policy_runs.write_config(tmp_path / "b", longer, **settings)
    for place in PLACES:
        run_process(killed, place, "2", folder=tmp_path)
    run_process(killed, folder=tmp_path)
    policy_runs.assert_same_run(policy_runs.read_run(tmp_path / "b"), expected)
