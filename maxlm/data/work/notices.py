"""Ctrl-C and a scheduler's notices, which may go to all processes of a job: a run's own acts on
them, and ends its workers when it has saved."""

import signal
from multiprocessing import resource_tracker

NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def leave_to_parent() -> None:
    """Ignore them in this process, a worker."""
    for number in NOTICES:
        signal.signal(number, signal.SIG_IGN)


def start_tracker() -> None:
    """Start the process in which Python notes what workers share, if it does not run: left to
    itself it would heed the last of them, and the next worker would not start without a warning."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)  # which it inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
