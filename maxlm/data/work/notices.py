"""Ctrl-C and a scheduler's notices, which may go to all processes of a job: a run's own acts on
them, and ends its workers when it has saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's "stop soon": SLURM's --signal and scancel, Kubernetes, TPU maintenance."""
NOTICES = (signal.SIGINT, *PREEMPTION)


@contextmanager
def withheld() -> Iterator[None]:
    """Within, this thread gets none of them, nor does any process or thread that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_tracker() -> None:
    """Start the process in which Python notes what workers share, if it does not run: left to
    itself it would heed the last of them, and the next worker would not start without a warning."""
    with withheld():
        resource_tracker.ensure_running()


def leave_to_parent() -> None:
    """Ignore them in this process, a worker, which was started while they were withheld: its
    imports take seconds."""
    for number in NOTICES:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICES)
