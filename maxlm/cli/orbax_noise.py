"""Says nothing of what Orbax drops where a checkpoint fails.

One of many reads or writes fails, its error is raised, and the command ends with one line. Of the
others Orbax lets go, and Python complains of each, some when the process is at its end, so that the
one line is neither alone nor last. Three parts of Python complain:

- a coroutine that raises while it is closed, or TensorStore's call to a loop that is closed:
  ``sys.unraisablehook``;
- a task or future whose exception nobody asked for: the logger "asyncio";
- a coroutine that never began: ``warnings``.
"""

import logging
import sys
import warnings
from typing import Any

# How OCDBT, the format of Orbax's arrays, and Orbax's own names show in a complaint's text.
_NAMES = ("orbax", "OCDBT")


def silence_orbax() -> None:
    """For the rest of the process; a complaint of anything else is told as before."""
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").addFilter(_is_told)
    warnings.filterwarnings("ignore", r"coroutine '[\w.<>]*serialize", RuntimeWarning)


def _unraisable(event: Any) -> None:
    code = getattr(event.object, "cr_code", None)  # a coroutine's
    dropped = code is not None and "orbax" in code.co_filename
    loop_closed = event.object is None and str(event.exc_value) == "Event loop is closed"
    if not (dropped or loop_closed):
        sys.__unraisablehook__(event)


def _is_told(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "exception was never retrieved" not in text or not any(name in text for name in _NAMES)
