"""Formats by the beginnings of their names."""

from collections.abc import Callable

from maxlm.config.registry import Registry
from maxlm.quantization.formats.format import Format

_INTEGER = "maxlm.quantization.formats.integer:parse_integer_format"
FORMATS = Registry[Callable[[str], Format]](
    "weight format",
    {f"int{bits}": _INTEGER for bits in (8, 4, 2, 3, 5, 6, 7)},
)
"""By the part of a format's name before its first dash, what reads the whole name:
``int4-g32`` by ``int4``."""


def parse_format(name: str) -> Format:
    """Returns the format of a name such as ``int4-g32``. Raises MaxlmError, with near
    names."""
    kind = name.partition("-")[0]
    return FORMATS.get(kind, setting="format")(name)
