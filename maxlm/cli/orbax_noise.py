"""Ignores complaints about the reads and writes that Orbax drops where a checkpoint fails.

The first that fails raises its error, which the command shows as one line. Orbax drops the others,
and Python complains about each: a coroutine that raises while it is closed, or TensorStore's call
to a closed loop (``sys.unraisablehook``); a task or future whose exception was never retrieved (the
logger "asyncio"); a coroutine that was never awaited (``warnings``).
"""

import logging
import sys
import warnings
from typing import Any

# Names of Orbax, and of OCDBT, the format of its arrays, in the text of a complaint.
_NAMES = ("orbax", "OCDBT")


def ignore_orbax_complaints() -> None:
    """Ignore them for the rest of the process; complaints about anything else are shown."""
    sys.unraisablehook = show_unraisable
    logging.getLogger("asyncio").addFilter(is_shown)
    warnings.filterwarnings("ignore", r"coroutine '[\w.<>]*serialize", RuntimeWarning)


def show_unraisable(event: Any) -> None:
    """Show what could not be raised, as Python does, unless Orbax dropped it."""
    code = getattr(event.object, "cr_code", None)  # a coroutine's
    dropped = code is not None and "orbax" in code.co_filename
    loop_closed = event.object is None and str(event.exc_value) == "Event loop is closed"
    if not (dropped or loop_closed):
        sys.__unraisablehook__(event)


def is_shown(record: logging.LogRecord) -> bool:
    """Return whether a record is about anything else."""
    text = record.getMessage()
    return "exception was never retrieved" not in text or not any(name in text for name in _NAMES)
