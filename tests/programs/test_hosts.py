"""Two processes of four devices train as one device does, with every axis across both."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from maxlm.programs.setup import set_up
from tests.ports import free_port
from tests.programs import cells, tiny
from tests.programs.test_parity import with_metrics

WORKER = Path(__file__).with_name("parity_worker.py")
NAMES = [f"{model}/{cell}" for cell, model in cells.HOST_MODELS.items()]


def test_two_processes_equal_one_device(tmp_path):
    for model in sorted(set(cells.HOST_MODELS.values())):
        config = cells.config_of(model, cells.ALONE)
        setup = set_up(config, cells.devices_of(config))
        state = cells.start_from(tmp_path / model, setup)
        for step, (metrics, after) in enumerate(cells.train(setup, state, packed=True)):
            known = with_metrics(cells.canonical(setup, after.params), metrics)
            np.savez(tmp_path / f"{model}-{step}.npz", **known)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(tmp_path), str(port), str(number), *NAMES],
            stdout=(tmp_path / f"{number}.log").open("w"),
            stderr=subprocess.STDOUT,
            env=tiny.environment(tmp_path),
        )
        for number in range(2)
    ]
    try:
        for number, process in enumerate(processes):
            log = tmp_path / f"{number}.log"
            assert process.wait() == 0, log.read_text()[-3000:]
            assert [line for line in log.read_text().splitlines() if line.endswith("agrees")] == [
                f"{name} agrees" for name in NAMES
            ]
    finally:
        for process in processes:
            process.kill()
