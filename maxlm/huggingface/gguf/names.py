"""Names of tensors: Hugging Face's beside those of GGUF files."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from maxlm.huggingface.gguf.metadata import ConfigValues
from maxlm.huggingface.gguf.rows import RowOrder

MakeRowOrder = Callable[[ConfigValues], RowOrder | None]
_PLACES = {"{layer}": r"(?P<layer>\d+)", "{expert}": r"(?P<expert>\d+)"}


@dataclass(frozen=True)
class NameRule:
    """A tensor's two names, with ``{layer}`` and ``{expert}`` for numbers. Where
    Hugging Face's alone has an expert, the file's is the stack of all."""

    gguf: str
    theirs: str
    make_row_order: MakeRowOrder | None = None
    """Returns the order of the file's rows, by values of config.json; None: Hugging
    Face's."""
    added: float = 0.0
    """What the file's values are above Hugging Face's."""
    is_transposed: bool = False
    """Whether Hugging Face has its inputs first."""
    is_row: bool = False
    """Whether Hugging Face has a matrix of one row, where the file has a vector."""
    is_used: Callable[[ConfigValues], bool] | None = None
    """Whether a model of these values of config.json has the tensor under this name;
    None: any may."""

    @property
    def is_stacked(self) -> bool:
        return "{expert}" in self.theirs and "{expert}" not in self.gguf

    @cached_property
    def gguf_pattern(self) -> re.Pattern[str]:
        return _compile(self.gguf)

    @cached_property
    def their_pattern(self) -> re.Pattern[str]:
        return _compile(self.theirs)


NameRules = tuple[NameRule, ...]


def _compile(name: str) -> re.Pattern[str]:
    pattern = re.escape(name)
    for place, digits in _PLACES.items():
        pattern = pattern.replace(re.escape(place), digits)
    return re.compile(pattern)


def fill_name(name: str, numbers: dict[str, str]) -> str:
    """Returns a name with its numbers of layer and expert."""
    for place in _PLACES:
        key = place.strip("{}")
        if key in numbers:
            name = name.replace(place, numbers[key])
    return name


def map_parts(
    gguf: str,
    theirs: str,
    parts: Iterable[str] = ("weight", "bias"),
    *,
    make_row_order: MakeRowOrder | None = None,
    added: float = 0.0,
    is_used: Callable[[ConfigValues], bool] | None = None,
) -> NameRules:
    """Returns the rules of a module's parts, a linear map's or a norm's."""
    return tuple(
        NameRule(
            f"{gguf}.{part}",
            f"{theirs}.{part}",
            make_row_order=make_row_order,
            added=added if part == "weight" else 0.0,
            is_used=is_used,
        )
        for part in parts
    )
