"""The ``gguf`` package (gguf-py), whose constants and writer serve here."""

from types import ModuleType

from maxlm.config import MaxlmError

SUFFIX = ".gguf"


def import_gguf() -> ModuleType:
    """Returns the package. Raises MaxlmError, with the line that installs it."""
    try:
        import gguf
    except ImportError as error:
        message = "GGUF files need the package gguf"
        raise MaxlmError(message, fix='pip install "maxlm[gguf]"') from error
    return gguf
