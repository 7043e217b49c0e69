"""The Ray driver on a real cluster of two nodes, with a stand-in for `maxlm`."""

import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from maxlm.launch.options import JobOptions
from tests.launch.conftest import DEFAULT_OPTIONS

ray = pytest.importorskip("ray")

STAND_IN = """#!/bin/bash
trap 'echo "saved $MAXLM_PROCESS_ID" >> "$LOG"; exit 75' TERM
start=$(grep -c "^start $MAXLM_PROCESS_ID " "$LOG")
echo "start $MAXLM_PROCESS_ID of $MAXLM_NUM_PROCESSES at $MAXLM_COORDINATOR" >> "$LOG"
if [[ $start == 0 ]]; then exit $((75 + MAXLM_PROCESS_ID)); fi
for ((i = 0; i < 6000; i++)); do sleep 0.1; done
"""


def write_driver(rendered, tmp_path, options=DEFAULT_OPTIONS):
    path = tmp_path / "driver.py"
    path.write_text(rendered("ray", "cpux8", options=replace(options, nodes=2)))
    return path


@pytest.mark.parametrize(
    ("codes", "worst"),
    [((75, 2), 2), ((139, 75), 76), ((-9, 0), 76), ((130, 76), 1), ((0, 0), 0)],
)
def test_the_worst_code_is_the_drivers(codes, worst, rendered, tmp_path, monkeypatch):
    driver = runpy.run_path(str(write_driver(rendered, tmp_path)))
    watch = driver["watch"]
    monkeypatch.setattr(ray, "get", list)

    def make_host(code):
        return SimpleNamespace(code=SimpleNamespace(remote=lambda: code))

    hosts = [make_host(code) for code in codes]
    assert watch(hosts, []) == worst


@pytest.mark.more
def test_processes_are_started_again_and_a_signal_reaches_all(
    ray_cluster, program, rendered, tmp_path
):
    log = tmp_path / "log"
    log.touch()
    stand_in = str(program("maxlm", STAND_IN))
    options = JobOptions(maxlm=stand_in, env=(f"LOG={log}",))
    driver = write_driver(rendered, tmp_path, options)
    env = {**os.environ, "RAY_ADDRESS": ray_cluster.address}
    process = subprocess.Popen([sys.executable, driver], env=env)
    deadline = time.monotonic() + 300
    while log.read_text().count("start") < 4:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    lines = log.read_text().splitlines()
    assert sorted(lines[4:]) == ["saved 0", "saved 1"]
    for first in (0, 2):
        starts, addresses = zip(
            *(line.split(" at ") for line in lines[first : first + 2]), strict=True
        )
        assert sorted(starts) == ["start 0 of 2", "start 1 of 2"]
        assert addresses[0] == addresses[1]
