"""Which matrix of a model gets which format."""

from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.config import MaxlmError
from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.quantization.config import QuantizationConfig
from maxlm.quantization.formats.registry import parse_format
from maxlm.quantization.leaf import QuantizedParam
from maxlm.run.quantize.scheme import Scheme

FALLBACKS = ("int8", "none")
"""Formats of matrices that a scheme's does not divide, the first that fits."""


@dataclass(frozen=True)
class ChosenFormats:
    """Formats of a model's matrices."""

    config: QuantizationConfig
    notes: tuple[str, ...]
    """A line for each format that stands in for the scheme's."""


def choose_formats(
    specs: Params, scheme: Scheme, targets: Sequence[str] | None
) -> ChosenFormats:
    """Gives all targets the scheme's format, and those that are no whole number of its
    blocks another. Raises MaxlmError: a target that the model has not.

    Args:
        specs: declarations of a model that is not quantized.
        targets: see :attr:`QuantizationConfig.targets`.
    """
    config = QuantizationConfig(
        format=scheme.format.name,
        targets=None if targets is None else tuple(targets),
        activations=scheme.activations,
    )
    flat = flatten_names(specs, is_leaf)
    misfits: dict[str, list[str]] = {}
    formats: dict[str, str] = {}
    for name, format_name in config.list_formats(specs).items():
        candidates = (format_name, *FALLBACKS)
        fitting = next(
            candidate for candidate in candidates if _fits(flat[name], candidate)
        )
        if fitting != format_name:
            formats[name] = fitting
            misfits.setdefault(fitting, []).append(name)
    notes = []
    for fallback, names in misfits.items():
        stays = "stay as they are" if fallback == "none" else f"are {fallback}"
        listed = ", ".join(names[:3])
        if len(names) > 3:
            listed += f" and {len(names) - 3} more"
        blocks = "x".join(map(str, scheme.format.block_shape))
        notes.append(f"no whole number of blocks of {blocks}: {listed} {stays}")
    return ChosenFormats(config.model_copy(update={"formats": formats}), tuple(notes))


def _fits(spec: ParamSpec, format_name: str) -> bool:
    if format_name == "none":
        return True
    try:
        QuantizedParam.declare(spec, parse_format(format_name))
    except MaxlmError:
        return False
    return True
