"""The Ray driver on a real cluster of two nodes, with a stand-in for `maxlm`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

STAND_IN = """#!/bin/bash
trap 'echo "saved $MAXLM_PROCESS_ID" >> "$LOG"; exit 75' TERM USR1
start=$(grep -c "^start $MAXLM_PROCESS_ID " "$LOG")
echo $$ >> "$LOG.pids"
echo "start $MAXLM_PROCESS_ID of $MAXLM_NUM_PROCESSES at $MAXLM_COORDINATOR" >> "$LOG"
read -ra codes <<< "$CODES"
code=${codes[start * MAXLM_NUM_PROCESSES + MAXLM_PROCESS_ID]}
if [[ $code == sleep ]]; then for ((i = 0; i < 600; i++)); do sleep 0.1; done; fi
exit "$code"
"""


@pytest.fixture
def drive(ray_cluster, program, rendered, tmp_path):
    """Starts a driver whose processes take these codes, process by process, start by start."""
    log, started = tmp_path / "log", []
    log.touch()

    def start(codes, **options):
        stand_in = str(program("maxlm", STAND_IN))
        env = (f"CODES={codes}", f"LOG={log}")
        driver = tmp_path / "driver.py"
        text = rendered("ray", "cpux8", nodes=2, maxlm=stand_in, env=env, **options)
        driver.write_text(text)
        process = subprocess.Popen(
            [sys.executable, driver],
            env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
            stdout=(tmp_path / "out").open("w"),
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process, log

    yield start
    for process in started:
        process.kill()


def wait_for(log, words, count):
    deadline = time.monotonic() + 3000
    while log.read_text().count(words) < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_processes_know_each_other_and_are_started_again(drive):
    process, log = drive("76 75 0 0")
    assert process.wait(timeout=300) == 0
    lines = log.read_text().splitlines()
    assert sorted(line.split(" at ")[0] for line in lines) == [
        *["start 0 of 2"] * 2,
        *["start 1 of 2"] * 2,
    ]
    first = {line.split(" at ")[1] for line in lines[:2]}
    assert len(first) == 1
    assert first.pop().rpartition(":")[2].isdigit()


@pytest.mark.parametrize(("codes", "code"), [("75 2", 2), ("139 75", 76)])
def test_the_worst_code_is_the_drivers(drive, codes, code):
    process, log = drive(codes, retries=0)
    assert process.wait(timeout=300) == code
    assert log.read_text().count("start") == 2


def test_a_process_left_alone_is_told_to_end(drive):
    process, log = drive("76 sleep", retries=0, grace=2)
    assert process.wait(timeout=300) == 76
    assert "saved 1" in log.read_text()


def test_a_signal_reaches_every_process(drive):
    process, log = drive("sleep sleep 0 0")
    wait_for(log, "start", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    assert sorted(log.read_text().splitlines()[2:]) == ["saved 0", "saved 1"]


def test_no_process_outlives_its_driver(drive, tmp_path):
    process, log = drive("sleep sleep")
    wait_for(log, "start", 2)
    process.kill()
    processes = [Path(f"/proc/{pid}") for pid in (tmp_path / "log.pids").read_text().split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 300
    while any(each.exists() for each in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_program_that_is_not_there_is_no_reason_to_try_again(drive, tmp_path, ray_cluster):
    process, _ = drive("0 0")
    process.kill()
    driver = tmp_path / "driver.py"
    driver.write_text(driver.read_text().replace("bin/maxlm", "bin/nothing"))
    env = {**os.environ, "RAY_ADDRESS": ray_cluster.address}
    done = subprocess.run([sys.executable, driver], env=env, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert b"No such file" in done.stderr
