"""Ctrl-C and a scheduler's stop signals: handlers, and worker processes that ignore
them.

A scheduler may signal every process of a job. The process that trains acts on the
signal; its workers ignore it, and end when that process has saved.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntFlag
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

from maxlm.config.errors import Preempted

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's "stop soon": SLURM's --signal and scancel, Kubernetes, TPU
maintenance."""
STOP_SIGNALS = (signal.SIGINT, *PREEMPTION_SIGNALS)


@contextmanager
def block_signals() -> Iterator[None]:
    """Blocks the stop signals in this thread and in processes and threads that it
    starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Starts multiprocessing's resource tracker with the stop signals blocked, and
    silent.

    Started by multiprocessing itself it would die of them, and the next worker would
    warn. It outlives this process, and would list what a process that is ended at once
    leaves behind: lines after the one that says why the run ended.
    """
    # It is a Python process, and gets this one's -W options.
    silence = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(silence)
    try:
        with block_signals():
            resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(silence)


def ignore_signals() -> None:
    """Ignores the stop signals in this process, a worker started while they were
    blocked."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def kill_starting_workers() -> None:
    """Kills the worker processes of this process that have not started yet, at its end.

    A worker that is still importing hears no signal but SIGKILL (they are blocked until
    `ignore_signals`) and holds nothing; multiprocessing would wait for it. Workers that
    have started are left to whoever uses them. Does nothing where there is no /proc.
    """
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # The thread has just ended.
            for child in children.read_text().split():
                if _is_starting_worker(Path("/proc", child)):
                    with suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)


def _is_starting_worker(process: Path) -> bool:
    """Tells whether a process, by its folder in /proc, was spawned by multiprocessing
    to work and still blocks the stop signals."""
    try:
        command = (process / "cmdline").read_bytes()
        status = (process / "status").read_text()
    except OSError:  # It has just ended.
        return False
    is_worker = b"--multiprocessing-fork" in command.split(b"\0")
    masks = [
        line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")
    ]
    blocked = int(masks[0], 16)
    return is_worker and bool(blocked >> (signal.SIGTERM - 1) & 1)


class StopRequest(IntFlag):
    """A process's request to all processes of its run at a step."""

    NONE = 0
    SAVE = 1
    """Save a checkpoint: it is time for one."""
    INTERRUPT = 2
    """Stop: the user pressed Ctrl-C."""
    PREEMPT = 4
    """Stop: the scheduler said so, and will start the run again."""

    @property
    def stops(self) -> bool:
        return bool(self & (StopRequest.INTERRUPT | StopRequest.PREEMPT))


class _SignalReceived(BaseException):
    """No ``Exception``: libraries that catch those would report an unreadable file
    instead."""


class SignalHandler:
    """Records the stop signals that this process receives; see
    :func:`handle_signals`."""

    def __init__(self):
        self._deferring = False
        self.request = StopRequest.NONE
        self._last_signal = signal.SIGTERM
        self.interrupted_work = False
        """Whether a scheduler's signal has raised an exception instead of being
        deferred."""

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Lets signals only be recorded in ``request`` in the block, for a loop that
        acts on them between steps. A second Ctrl-C still raises. Outside the block a
        signal raises at once."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_if_signaled(self) -> None:
        """Raises for a signal that arrived after the loop's last step."""
        if StopRequest.PREEMPT in self.request:
            self.interrupted_work = True
            raise _SignalReceived(self._last_signal.name)
        if StopRequest.INTERRUPT in self.request:
            raise KeyboardInterrupt

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = StopRequest.INTERRUPT in self.request
        is_interrupt = number == signal.SIGINT
        self.request |= StopRequest.INTERRUPT if is_interrupt else StopRequest.PREEMPT
        if is_interrupt and (again or not self._deferring):
            raise KeyboardInterrupt
        self._last_signal = signal.Signals(number)
        if not self._deferring:
            self.interrupted_work = True
            raise _SignalReceived(self._last_signal.name)


@contextmanager
def handle_signals(folder: str) -> Iterator[SignalHandler]:
    """Handles the stop signals in this block; outside the main thread it leaves them
    alone. Raises Preempted, which names the run's folder, for a scheduler's signal that
    no loop deferred."""
    handler = SignalHandler()
    before = {}
    with suppress(ValueError):  # Not the main thread.
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, handler._handle)
    try:
        yield handler
    except _SignalReceived as received:
        raise Preempted(
            f"preempted ({received}) while no step was under way",
            where=folder,
            fix="run the same command to resume",
        ) from None
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
