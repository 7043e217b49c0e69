"""Schemes: how a model is quantized, by name.

A name is the algorithm, if it is another than rounding to the nearest, and the format:
``int8``, ``gptq-int4-g128``, ``awq-int4-g32``, ``awq-gptq-int4-g32``. ``w8a8`` and
``smoothquant`` round activations to int8, too, ``w8a8-fp8`` both to fp8.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from maxlm.config import MaxlmError
from maxlm.quantization.activations import ActivationRounding
from maxlm.quantization.formats.format import Format
from maxlm.quantization.formats.registry import FORMATS, parse_format

Algorithm = Literal["round", "gptq", "awq", "awq-gptq", "smoothquant"]
EXAMPLES = (
    "int8",
    "fp8",
    "nf4-double",
    "int4-g32",
    "q4_k",
    "gptq-int4-g128",
    "awq-int4-g128",
    "awq-gptq-int4-g32",
    "w8a8",
    "w8a8-fp8",
    "smoothquant",
)
"""Schemes that messages and help name."""


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized."""

    name: str
    algorithm: Algorithm
    format: Format
    activations: ActivationRounding | None = None
    """What inputs of products are rounded to, each token by itself."""

    @property
    def is_calibrated(self) -> bool:
        """Whether it reads a text."""
        return self.algorithm != "round"


def parse_scheme(name: str) -> Scheme:
    """Returns the scheme of a name. Raises MaxlmError, with near names."""
    if name == "w8a8":
        return Scheme(name, "round", parse_format("int8"), activations="int8")
    if name == "w8a8-fp8":
        return Scheme(name, "round", parse_format("fp8"), activations="fp8")
    if name == "smoothquant":
        return Scheme(name, "smoothquant", parse_format("int8"), activations="int8")
    algorithms: tuple[Algorithm, ...] = ("awq-gptq", "gptq", "awq")
    for algorithm in algorithms:
        prefix = f"{algorithm}-"
        if name.startswith(prefix):
            format = _parse_format_of(name, name.removeprefix(prefix))
            return Scheme(name, algorithm, format)
    return Scheme(name, "round", _parse_format_of(name, name))


def _parse_format_of(scheme: str, format_name: str) -> Format:
    kind = format_name.partition("-")[0]
    if FORMATS.find(kind) is None:
        near = get_close_matches(scheme, [*EXAMPLES, *FORMATS.kinds()], n=3, cutoff=0.4)
        fix = f"use one such as {', '.join(near or EXAMPLES)}"
        raise MaxlmError(f"no scheme {scheme!r}", where="--scheme", fix=fix)
    return parse_format(format_name)
