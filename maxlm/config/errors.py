"""The one error type for anything a user can cause."""

# What a scheduler is told by the exit code: a run that was saved and is to be started again (BSD's
# EX_TEMPFAIL), and one to be started again from its last checkpoint.
PREEMPTED, LOST = 75, 76


class MaxlmError(Exception):
    """A mistake a user can put right: what is wrong, where, and what to do about it.

    The command line prints it on one line, without a traceback, and exits with code 2.

    Args:
        what: the fault, with the offending value ("num_heads=6 is not divisible by ...").
        where: the file and line, config key or path it was found at.
        fix: what to do next, as an imperative.
    """

    exit_code = 2
    together = False
    """All processes of a run raise it at the same point: none has to end the others."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)

    def __reduce__(self):
        # Worker processes send these back; the default would drop the keyword arguments.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[MaxlmError], what: str, where: str | None, fix: str | None) -> MaxlmError:
    return kind(what, where=where, fix=fix)


class Preempted(MaxlmError):
    """Not a mistake: the run was told to stop, and nothing that it did is lost."""

    exit_code = PREEMPTED
