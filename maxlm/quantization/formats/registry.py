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
        "int8": "maxlm.quantization.formats.integer:read_integer_format",
        "int7": "maxlm.quantization.formats.integer:read_integer_format",
        "int6": "maxlm.quantization.formats.integer:read_integer_format",
        "int5": "maxlm.quantization.formats.integer:read_integer_format",
        "int4": "maxlm.quantization.formats.integer:read_integer_format",
        "int3": "maxlm.quantization.formats.integer:read_integer_format",
        "int2": "maxlm.quantization.formats.integer:read_integer_format",
        "fp8": "maxlm.quantization.formats.floats8:read_float8_format",
        "fp8e5m2": "maxlm.quantization.formats.floats8:read_float8_format",
        "nf4": "maxlm.quantization.formats.normal_float:read_normal_float_format",
        "mxfp8": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "mxfp8e5m2": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "mxfp4": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "nvfp4": "maxlm.quantization.formats.nvfp4:read_nvfp4_format",
        "e8p": "maxlm.quantization.formats.e8p:read_e8p_format",
    },
)
"""By the part of a format's name before its first dash, what reads the whole name:
``int4-g32`` by ``int4``."""


def parse_format(name: str) -> Format:
    """Returns the format of a name such as ``int4-g32``. Raises MaxlmError, with near
    names."""
    kind = name.partition("-")[0]
    return FORMATS.get(kind, setting="format")(name)
