"""``maxlm train`` with something amiss: ``faults_worker.py FAULT NUMBER ARGUMENTS...``,
where ARGUMENTS are those of ``maxlm``.

FAULT, at the batch of that NUMBER: ``hang``, never to go on; ``slow``, which every
batch is from there on; ``none``.
"""

import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from jax._src import compiler, distributed

from maxlm.cli.main import main
from maxlm.plan import hardware
from tests.train import tiny

SLOW = 0.25  # seconds a batch, by which what looks on from outside is quicker


def a_place_to_hang() -> None:
    time.sleep(3600)


def write_to_cache(*arguments: Any, write: Any = compiler._cache_write) -> None:
    """As every process should: JAX lets process 0 alone, whose programs others cannot
    read here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.global_state, "process_id", 0)
        write(*arguments)


def run() -> NoReturn:
    """Runs the program of this process's arguments."""
    fault, place, *arguments = sys.argv[1:]

    def change(number: int, batch: Any) -> Any:
        if fault == "hang" and number == int(place):
            a_place_to_hang()
        if fault == "slow" and number >= int(place):
            time.sleep(SLOW)
        return batch

    patch = pytest.MonkeyPatch()
    tiny.spoil_batches(patch, change)
    patch.setattr(compiler, "_cache_write", write_to_cache)
    # Measuring would keep all cores busy for 2 s in every process.
    patch.setattr(
        hardware, "measure_cpu", lambda _: replace(hardware.CHIPS["h100"], name="cpu")
    )
    sys.argv[1:] = arguments
    sys.exit(main())


if __name__ == "__main__":
    run()
