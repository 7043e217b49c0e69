"""Formats by the beginnings of their names."""

from collections.abc import Callable

from maxlm.config.registry import Registry
from maxlm.quantization.formats.format import Format

FORMATS = Registry[Callable[[str], Format]](
    "weight format",
    {
        "q4_0": "maxlm.quantization.formats.ggml.types:parse_ggml_format",
        "q4_1": "maxlm.quantization.formats.ggml.types:parse_ggml_format",
        "q5_0": "maxlm.quantization.formats.ggml.types:parse_ggml_format",
        "q5_1": "maxlm.quantization.formats.ggml.types:parse_ggml_format",
        "q8_0": "maxlm.quantization.formats.ggml.types:parse_ggml_format",
    },
)
"""By the part of a format's name before its first dash, what reads the whole name:
``int4-g32`` by ``int4``."""


def parse_format(name: str) -> Format:
    """Returns the format of a name such as ``int4-g32``. Raises MaxlmError, with near
    names."""
    kind = name.partition("-")[0]
    return FORMATS.get(kind, setting="format")(name)
