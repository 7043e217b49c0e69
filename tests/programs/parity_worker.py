"""One of two processes of four devices: ``parity_worker.py FOLDER PORT PROCESS CELL...``.

Trains each cell's model from FOLDER's checkpoint and compares with what one device made, kept there
by :mod:`test_hosts`.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlm.programs.setup import set_up
from tests.programs import cells
from tests.programs.test_parity import differences


def main() -> None:
    folder, port, process, *names = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    for name in names:
        model, cell = name.split("/")
        config = cells.config_of(model, cells.HOST_CELLS[cell])
        setup = set_up(config)
        state = cells.start_from(Path(folder) / model, setup)
        for step, (metrics, after) in enumerate(cells.train(setup, state, packed=True)):
            whole = multihost_utils.process_allgather(after.params, tiled=True)
            ours = cells.canonical(setup, whole)
            with np.load(Path(folder) / f"{model}-{step}.npz") as theirs:
                wrong = differences(metrics, ours, dict(theirs))
            assert not wrong, f"{name} step {step}: {wrong}"
        print(f"{name} agrees", flush=True)


if __name__ == "__main__":
    main()
