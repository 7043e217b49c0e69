"""The one error type for anything a user can cause."""


class MaxlmError(Exception):
    """A mistake a user can put right: what is wrong, where, and what to do about it.

    The command line prints it on one line, without a traceback, and exits with code 2.

    Args:
        what: the fault, with the offending value ("num_heads=6 is not divisible by ...").
        where: the file and line, config key or path it was found at.
        fix: what to do next, as an imperative.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}; {fix}" if fix else message)

    def __reduce__(self):
        # Worker processes send these back; the default would drop the keyword arguments.
        return _rebuild, (self.what, self.where, self.fix)


def _rebuild(what: str, where: str | None, fix: str | None) -> MaxlmError:
    return MaxlmError(what, where=where, fix=fix)
