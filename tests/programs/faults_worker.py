"""``maxlm train`` with something amiss: ``faults_worker.py FAULT NUMBER ARGUMENTS...``, where
ARGUMENTS are those of ``maxlm``.

FAULT, at the batch of that NUMBER: ``hang``, never to go on; ``slow``, which every batch is from
there on.
"""

import sys
import time
from typing import Any

import pytest

from maxlm.cli.main import main
from tests.programs import tiny

SLOW = 0.25  # seconds a batch, by which what looks on from outside is quicker


def a_place_to_hang() -> None:
    time.sleep(3600)


if __name__ == "__main__":
    fault, place, *arguments = sys.argv[1:]

    def change(number: int, batch: Any) -> Any:
        if fault == "hang" and number == int(place):
            a_place_to_hang()
        if fault == "slow" and number >= int(place):
            time.sleep(SLOW)
        return batch

    tiny.spoil_batches(pytest.MonkeyPatch(), change)
    sys.argv[1:] = arguments
    sys.exit(main())
