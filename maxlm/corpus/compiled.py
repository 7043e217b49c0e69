"""The door to `kernels`, whose loops Numba compiles."""

from importlib import import_module
from typing import Any

from maxlm.config import MaxlmError


def compiled(name: str) -> Any:
    """The module `kernels.NAME`.

    Raises:
        MaxlmError: Numba is not installed.
    """
    try:
        return import_module(f"maxlm.corpus.kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        what = "labelling documents needs Numba, which is not installed"
        raise MaxlmError(what, fix="pip install 'maxlm[corpus]'") from error
