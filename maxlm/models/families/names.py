"""The vocabulary of name tables: how one of their tensors is made of our parameters.

A table maps a tensor's name to a rule, and a rule names the parameters. Names may hold ``{layer}``
and ``{expert}``; parameters of layers are named as within one (``attention.query.kernel``), all
others by their full name, and so are those of an encoder beside a decoder, whose layers are
``{encoder_layer}``. A rule whose parameters a model does not have is passed over, so that
one table serves models with and without biases, ties or experts. What is left without an entry is
found when a table is used: every parameter must be filled exactly once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from maxlm.models.params import ParamSpec, flatten_names, param_specs
from maxlm.sharding import AxisRules

Array = np.ndarray


class ParamSlice(NamedTuple):
    """A parameter, or the part of it that belongs to one layer (and one expert)."""

    name: str
    """Canonical, as in "layers.attention.query.kernel"."""
    index: tuple[int, ...] = ()
    """Leading indices: the layer, and maybe the expert; none for all of the parameter."""


class ParamPiece(NamedTuple):
    """The shape of a parameter, or of a slice."""

    shape: tuple[int, ...]
    inputs: int
    """Leading dimensions that a map sums over; 0 of vectors and tables."""

    @property
    def rows(self) -> int:
        """Outputs of a map, or all elements of a vector."""
        return prod(self.shape[self.inputs :])


class TensorForm(NamedTuple):
    """A tensor of theirs: its shape, and how it becomes pieces and is made of them."""

    shape: tuple[int, ...]
    split: Callable[[Array], Sequence[Array]]
    join: Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class TensorRule:
    ours: tuple[str, ...]
    form: Callable[[tuple[ParamPiece, ...]], TensorForm]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of theirs and where it lies in ours.

    ``split`` and ``join`` are pure, see fp32, and may return views of what they were given.
    """

    theirs: str
    """Its full name in the safetensors files."""
    shape: tuple[int, ...]
    """There."""
    ours: tuple[ParamSlice, ...]
    split: Callable[[Array], Sequence[Array]] = lambda tensor: (tensor,)
    """Theirs → an array for each place, in the shape of the parameter at its index."""
    join: Callable[[Sequence[Array]], Array] = lambda parts: parts[0]
    """The inverse."""
    aliases: tuple[str, ...] = ()
    """Names under which the same tensor may be stored again (tied heads)."""


NameTable = Mapping[str, TensorRule]


def list_entries(config: Any, table: NameTable) -> list[TensorEntry]:
    """Returns all tensors of a model under its family's names."""
    specs = flatten_names(param_specs(config.build(rules=AxisRules(), dtype=np.float32)))
    experts = range(config.moe.num_experts if config.moe else 0)
    found: list[TensorEntry] = []
    for name, rule in table.items():
        if "{encoder_layer}" in name:
            for layer in range(config.encoder_layers):
                full = name.format(encoder_layer=layer)
                found += _entry(full, rule, specs, rule.ours, (layer,))
            continue
        if "{layer}" not in name:
            found += _entry(name, rule, specs, rule.ours, ())
            continue
        for layer in range(config.num_layers):
            part, index = config.place_of(layer)
            ours = tuple(f"{part}.{own}" for own in rule.ours)
            for expert in experts if "{expert}" in name else (None,):
                full = name.format(layer=layer, expert=expert)
                at = (index,) if expert is None else (index, expert)
                found += _entry(full, rule, specs, ours, at)
    own = {entry.theirs for entry in found}
    for at, entry in enumerate(found):
        if not own.isdisjoint(entry.aliases):  # an untied head is no other name of the table
            found[at] = replace(entry, aliases=tuple(a for a in entry.aliases if a not in own))
    return found


def _entry(
    name: str, rule: TensorRule, specs: Mapping[str, ParamSpec], ours: tuple[str, ...], at: Any
) -> list[TensorEntry]:
    if any(own not in specs for own in ours):
        return []
    form = rule.form(tuple(_piece(specs[own], len(at)) for own in ours))
    places = tuple(ParamSlice(own, at) for own in ours)
    return [TensorEntry(name, form.shape, places, form.split, form.join, rule.aliases)]


def _piece(spec: ParamSpec, leading: int) -> ParamPiece:
    # An expert's inputs stand behind the expert axis, which an index may or may not have removed.
    inputs = 0 if not spec.contract else spec.contract[-1] + 1 - leading
    return ParamPiece(spec.shape[leading:], inputs)
