"""Two processes of four devices train as one device does, with every axis across both.

Run as a program, this is one of them: ``test_hosts.py FOLDER PORT PROCESS
MODEL/CELL...`` trains each cell's model from FOLDER's checkpoint, and compares with
what one device made, kept there.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from maxlm.run.setup import set_up_run
from tests.ports import free_port
from tests.train import cells, tiny
from tests.train.test_parity import differences, with_metrics

pytestmark = pytest.mark.heavy

NAMES = [
    f"{model}/{name}"
    for name, cell in cells.HOST_CELLS.items()
    for model in cell.models
]
# `make test-more` takes the one in which most meets, `make test-layouts` the rest.
FEW = ["/".join(reversed(cells.HOSTS_COVER))]
REST = [name for name in NAMES if name not in FEW]
assert len(REST) == len(NAMES) - 1


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, marks=pytest.mark.more),
        pytest.param(REST, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_device(tmp_path, names):
    for model in sorted({name.split("/")[0] for name in names}):
        config = cells.config_of(model, cells.ALONE)
        setup = set_up_run(config, cells.devices_of(config))
        state = cells.start_from(tmp_path / model, setup)
        for step, (metrics, after) in enumerate(cells.train(setup, state)):
            known = with_metrics(cells.canonical(setup, after.params), metrics)
            np.savez(tmp_path / f"{model}-{step}.npz", **known)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(port), str(number), *names],
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
            assert [
                line for line in log.read_text().splitlines() if line.endswith("agrees")
            ] == [f"{name} agrees" for name in names]
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    folder, port, process, *names = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    for name in names:
        model, cell = name.split("/")
        config = cells.config_of(model, cells.HOST_CELLS[cell])
        setup = set_up_run(config)
        state = cells.start_from(Path(folder) / model, setup)
        for step, (metrics, after) in enumerate(cells.train(setup, state)):
            whole = multihost_utils.process_allgather(after.params, tiled=True)
            ours = cells.canonical(setup, whole)
            with np.load(Path(folder) / f"{model}-{step}.npz") as theirs:
                wrong = differences(metrics, ours, dict(theirs))
            assert not wrong, f"{name} step {step}: {wrong}"
        print(f"{name} agrees", flush=True)


if __name__ == "__main__":
    main()
