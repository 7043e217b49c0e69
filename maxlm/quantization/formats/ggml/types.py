"""GGML's formats by name."""

from maxlm.config.errors import MaxlmError
from maxlm.quantization.formats.ggml.affine_k import GgmlQ2_K, GgmlQ4_K, GgmlQ5_K
from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.iq4_nl import GgmlIQ4_NL
from maxlm.quantization.formats.ggml.legacy import (
    GgmlQ4_0,
    GgmlQ4_1,
    GgmlQ5_0,
    GgmlQ5_1,
    GgmlQ8_0,
)
from maxlm.quantization.formats.ggml.symmetric_k import GgmlQ3_K, GgmlQ6_K

GGML_FORMATS: dict[str, GgmlFormat] = {
    number_format.type_name: number_format
    for number_format in (
        *(GgmlQ4_0(), GgmlQ4_1(), GgmlQ5_0(), GgmlQ5_1(), GgmlQ8_0()),
        *(GgmlQ2_K(), GgmlQ3_K(), GgmlQ4_K(), GgmlQ5_K(), GgmlQ6_K()),
        GgmlIQ4_NL(),
    )
}
"""By GGML's names of them."""


def get_ggml_format(type_name: str) -> GgmlFormat:
    """Returns the format of a type's name as in ``gguf.GGMLQuantizationType``, such as
    ``Q4_K``. Raises MaxlmError: another type."""
    if type_name not in GGML_FORMATS:
        fix = f"quantize the file anew as one of {', '.join(GGML_FORMATS)}"
        raise MaxlmError(f"no number format of GGML's type {type_name}", fix=fix)
    return GGML_FORMATS[type_name]


def parse_ggml_format(name: str) -> GgmlFormat:
    """Returns the format of a name such as ``q4_k``."""
    return get_ggml_format(name.upper())
