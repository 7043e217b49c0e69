"""Formats by the beginnings of their names."""

from collections.abc import Callable

from maxlm.config.registry import Registry
from maxlm.quantization.formats.format import Format

_INTEGER = "maxlm.quantization.formats.integer:read_integer_format"
_GGML = "maxlm.quantization.formats.ggml.types:parse_ggml_format"
FORMATS = Registry[Callable[[str], Format]](
    "weight format",
    {
        **dict.fromkeys(
            ("int8", "int4", "int2", "int3", "int5", "int6", "int7"), _INTEGER
        ),
        "fp8": "maxlm.quantization.formats.floats8:read_float8_format",
        "fp8e5m2": "maxlm.quantization.formats.floats8:read_float8_format",
        "nf4": "maxlm.quantization.formats.normal_float:read_normal_float_format",
        "mxfp8": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "mxfp8e5m2": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "mxfp4": "maxlm.quantization.formats.microscaling:read_microscaling_format",
        "nvfp4": "maxlm.quantization.formats.nvfp4:read_nvfp4_format",
        "e8p": "maxlm.quantization.formats.e8p:read_e8p_format",
        **dict.fromkeys(
            (
                *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"),
                *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
            ),
            _GGML,
        ),
    },
)
"""By the part of a format's name before its first dash, what reads the whole name:
``int4-g32`` by ``int4``."""


def parse_format(name: str) -> Format:
    """Returns the format of a name such as ``int4-g32``. Raises MaxlmError, with near
    names."""
    kind = name.partition("-")[0]
    return FORMATS.get(kind, setting="format")(name)
