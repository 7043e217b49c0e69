"""The one error type for anything a user can cause, and conditions that raise it."""

import errno
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import ValidationError

# Exit codes by which a scheduler knows what to do with the run: one that was saved and
# is to be started again (BSD's EX_TEMPFAIL), and one to be started again from its last
# checkpoint.
PREEMPTED = 75
LOST = 76

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
        message: the fault, with the offending value ("num_heads=6 is not divisible by
            ...").
        where: the file and line, config key or path it was found at.
        fix: what to do next, as an imperative.
    """

    exit_code = 2
    on_all_processes = False
    """Whether all processes of a run raise it at the same point: none has to end the
    others."""

    def __init__(
        self, message: str, *, where: str | None = None, fix: str | None = None
    ):
        self.message = message
        self.where = where
        self.fix = fix
        line = f"{where}: {message}" if where else message
        super().__init__(f"{line}; {fix}" if fix else line)

    def __reduce__(self):
        # Worker processes send these back; the default would drop the keyword
        # arguments.
        return partial(type(self), where=self.where, fix=self.fix), (self.message,)


class Preempted(MaxlmError):
    """A scheduler stopped the run, and its state is saved; no mistake."""

    exit_code = PREEMPTED


class ProcessLost(MaxlmError):
    """Processes did not come, or died on the way; no mistake of the user's."""

    exit_code = LOST


def find_user_error(error: BaseException) -> MaxlmError | None:
    """Returns an error that a user can put right: one of ours, or a fault of the
    machine as one of ours. None for anything else, which is a bug."""
    if isinstance(error, MaxlmError):
        return error
    if isinstance(error, OSError) and error.filename and error.errno in _MACHINE:
        return MaxlmError((error.strerror or "").lower(), where=str(error.filename))
    return None


def describe_first_error(error: "ValidationError") -> str:
    """Returns the first of pydantic's errors: the key, if it has one, and the fault."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}" if key else first["msg"]


Count: TypeAlias = "int | NDArray[np.int64]"
"""A size of one run; or of very many candidates, an array with an element for each."""


class Requirement(NamedTuple):
    """A condition on sizes, checked for one run, or asked of very many candidates."""

    is_met: "bool | np.bool_ | NDArray[np.bool_]"
    """Of very many candidates an array, an element for each."""
    error: Callable[[], MaxlmError]


def check_requirements(requirements: Iterable[Requirement]) -> None:
    """Raise the error of the first requirement that is not met."""
    for requirement in requirements:
        if not requirement.is_met:
            raise requirement.error()
