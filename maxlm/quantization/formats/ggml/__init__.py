"""GGML's number formats, those of GGUF files: blocks of 32 with a scale each, and the
k-quants' superblocks of 256.

Codes are those of llama.cpp's own quantizers (``ggml-quants.c``, without an importance
matrix), byte for byte; :mod:`~maxlm.quantization.formats.ggml.rounding` says how.
"""

from maxlm.quantization.formats.ggml.ggml_format import GgmlFormat
from maxlm.quantization.formats.ggml.types import get_ggml_format

__all__ = ["GgmlFormat", "get_ggml_format"]
