"""The one error type for anything a user can cause, and conditions that raise it."""

import errno
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

# What a scheduler is told by the exit code: a run that was saved and is to be started
# again (BSD's EX_TEMPFAIL), and one to be started again from its last checkpoint.
PREEMPTED, LOST = 75, 76

# Faults of the machine, its permissions or a path's length: no bug of ours hides behind
# them.
_MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EIO, errno.ESTALE),
}


class MaxlmError(Exception):
    """A mistake a user can put right: what is wrong, where, and what to do about it.

    The command line prints it on one line, without a traceback, and exits with code 2.

    Args:
        what: the fault, with the offending value ("num_heads=6 is not divisible by
            ...").
        where: the file and line, config key or path it was found at.
        fix: what to do next, as an imperative.
    """

    exit_code = 2
    on_all_processes = False
    """Whether all processes of a run raise it at the same point: none has to end the
    others."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)

    def __reduce__(self):
        # Worker processes send these back; the default would drop the keyword
        # arguments.
        return partial(type(self), where=self.where, fix=self.fix), (self.what,)


class Preempted(MaxlmError):
    """A scheduler stopped the run, and its state is saved; no mistake."""

    exit_code = PREEMPTED


class ProcessLost(MaxlmError):
    """Processes did not come, or died on the way; no mistake of the user's."""

    exit_code = LOST


def find_user_error(error: BaseException) -> MaxlmError | None:
    """Returns an error that a user can put right, ours or, as ours, the system's; or
    None."""
    if isinstance(error, MaxlmError):
        return error
    if isinstance(error, OSError) and error.filename and error.errno in _MACHINE:
        return MaxlmError((error.strerror or "").lower(), where=str(error.filename))
    return None


class Requirement(NamedTuple):
    """A condition on sizes, checked for one run, or asked of very many candidates."""

    is_met: Any
    """A bool; or an array of them, an element for every candidate."""
    error: Callable[[], MaxlmError]


def check_requirements(requirements: Iterable[Requirement]) -> None:
    """Raise the error of the first requirement that is not met."""
    for requirement in requirements:
        if not requirement.is_met:
            raise requirement.error()
