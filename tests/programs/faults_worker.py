"""``maxlm train`` with something amiss: ``faults_worker.py FAULT PLACE ARGUMENTS...``, where
ARGUMENTS are those of ``maxlm``. What is done to it is done from outside its code, in the functions
that it is given batches and evaluations by.

FAULT, at PLACE, which is a batch's number or ``evaluation``: ``hang``, never to go on; ``SIGTERM``
or another signal, sent to itself; ``slow``, which every batch is from there on.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maxlm.cli.main import main
from maxlm.programs import train
from maxlm.programs.evaluation import HeldOutEvaluator

SLOW = 0.25  # seconds a batch, by which what looks on from outside is quicker


def befall(fault: str) -> None:
    if fault == "hang":
        a_place_to_hang()
    elif fault != "slow":
        os.kill(os.getpid(), signal.Signals[fault])


def a_place_to_hang() -> None:
    time.sleep(3600)


def spoil_batches(fault: str, place: int) -> None:
    original = train.load_training_batches

    @contextmanager
    def spoiled(setup: Any, source: Any, start: int, skips: Any = ()):
        with original(setup, source, start, skips) as batches:

            def each() -> Iterator[Any]:
                for number, batch in enumerate(batches, start):
                    if number == place:
                        befall(fault)
                    if fault == "slow" and number >= place:
                        time.sleep(SLOW)
                    yield batch

            yield each()

    train.load_training_batches = spoiled


def spoil_evaluation(fault: str) -> None:
    original = HeldOutEvaluator.evaluate

    def spoiled(*arguments: Any) -> Any:
        befall(fault)
        return original(*arguments)

    HeldOutEvaluator.evaluate = spoiled  # pyright: ignore


if __name__ == "__main__":
    fault, place, *arguments = sys.argv[1:]
    spoil_evaluation(fault) if place == "evaluation" else spoil_batches(fault, int(place))
    sys.argv[1:] = arguments
    sys.exit(main())
