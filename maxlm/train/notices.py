"""Notices that a run must stop: Ctrl-C, and the signals of schedulers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maxlm.config.errors import Preempted
from maxlm.data.work.notices import NOTICES
from maxlm.train.agreement import Wish


class _Told(BaseException):
    """Like KeyboardInterrupt no ``Exception``: a library that makes another error of each, or of
    an unreadable file, must not make one of this."""


class Notices:
    """What this process was told; see :func:`noticing`."""

    def __init__(self):
        self._holding, self.wish = False, Wish.NONE
        self._newest = signal.SIGTERM
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

    def heed(self) -> None:
        """Act on a notice that came too late for the loop that held it."""
        if Wish.PREEMPT in self.wish:
            self.at_once = True
            raise _Told(self._newest.name)
        if Wish.INTERRUPT in self.wish:
            raise KeyboardInterrupt

    def _told(self, number: int, _: FrameType | None) -> None:
        again = Wish.INTERRUPT in self.wish
        self.wish |= Wish.INTERRUPT if number == signal.SIGINT else Wish.PREEMPT
        if number == signal.SIGINT and (again or not self._holding):
            raise KeyboardInterrupt
        self._newest = signal.Signals(number)
        if not self._holding:
            self.at_once = True
            raise _Told(self._newest.name)


@contextmanager
def noticing(folder: str) -> Iterator[Notices]:
    """Notice signals in this block; ``folder``: the run's, for messages.

    In a thread that may not (a notebook's worker) signals are left alone.

    Raises:
        Preempted: told to stop by a scheduler while no loop held the notice.
    """
    notices = Notices()
    before = {}
    try:
        for number in NOTICES:
            before[number] = signal.signal(number, notices._told)
    except ValueError:  # Not the main thread.
        pass
    try:
        yield notices
    except _Told as told:
        raise Preempted(
            f"told to stop ({told}) while no step was under way",
            where=folder,
            fix="run the same command to go on",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
