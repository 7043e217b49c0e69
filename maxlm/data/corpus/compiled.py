"""The door to the modules `_fast_*.py`, whose loops Numba compiles."""

from importlib import import_module
from typing import Any

from maxlm.config import MaxlmError


def compiled(name: str) -> Any:
    """The module `_fast_NAME`.

    Raises:
        MaxlmError: Numba is not installed.
    """
    try:
        return import_module(f"maxlm.data.corpus._fast_{name}")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        what = "labelling documents needs Numba, which is not installed"
        raise MaxlmError(what, fix="pip install 'maxlm[corpus]'") from error
