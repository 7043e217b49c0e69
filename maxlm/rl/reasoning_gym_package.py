"""The package reasoning-gym, without what has to be compiled."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

from maxlm.config import MaxlmError

INSTALLATION = "pip install 'maxlm[rl]' && pip install --no-deps reasoning-gym"
"""How it is installed."""
# One of its tasks draws puzzles with it; all others, and all scorers, do without. It
# has no wheels: it would have to be compiled.
_SOLVER = "pycosat"


def import_reasoning_gym() -> ModuleType:
    """Returns ``reasoning_gym.factory``, all of whose tasks are registered. Raises
    MaxlmError: it, or what it imports, is not installed."""
    has_solver = _SOLVER in sys.modules or find_spec(_SOLVER) is not None
    if not has_solver:
        sys.modules[_SOLVER] = ModuleType(_SOLVER)
    try:
        return importlib.import_module("reasoning_gym.factory")
    except ModuleNotFoundError as error:
        message = f"reasoning-gym needs the package {error.name}"
        raise MaxlmError(message, fix=INSTALLATION) from None
    finally:
        if not has_solver:
            del sys.modules[_SOLVER]
