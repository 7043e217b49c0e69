"""Notices that a run must stop: Ctrl-C, and the signals of schedulers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maxlm.config.errors import Preempted
from maxlm.train.agreement import Wish

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's "stop soon": SLURM's --signal and scancel, Kubernetes, TPU maintenance."""


class Notices:
    """What this process was told; see :func:`noticing`."""

    def __init__(self, folder: str):
        self._folder, self._holding, self.wish = folder, False, Wish.NONE
        self.at_once = False
        """A scheduler's notice has ended what was going on."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, a notice is only written down in ``wish``, for a loop to act on it when the state
        is safe (but a second Ctrl-C ends at once). Without, it ends what is going on."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def _told(self, number: int, _: FrameType | None) -> None:
        again = Wish.INTERRUPT in self.wish
        self.wish |= Wish.INTERRUPT if number == signal.SIGINT else Wish.PREEMPT
        if number == signal.SIGINT and (again or not self._holding):
            raise KeyboardInterrupt
        if not self._holding:
            self.at_once = True
            raise Preempted(
                f"told to stop ({signal.Signals(number).name}) while no step was under way",
                where=self._folder,
                fix="run the same command to go on",
            )


@contextmanager
def noticing(folder: str) -> Iterator[Notices]:
    """Notice signals in this block; ``folder``: the run's, for messages.

    In a thread that may not (a notebook's worker) signals are left alone.
    """
    notices = Notices(folder)
    before = {}
    try:
        for number in (signal.SIGINT, *PREEMPTION):
            before[number] = signal.signal(number, notices._told)
    except ValueError:  # Not the main thread.
        pass
    try:
        yield notices
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
