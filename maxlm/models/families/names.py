"""The vocabulary of name tables: how one of their tensors is made of our parameters.

A table maps a tensor's name to a rule, and a rule names the parameters. Names may hold ``{layer}``
and ``{expert}``; parameters of layers are named as within one (``attention.query.kernel``), all
others by their full name, and so are those of an encoder beside a decoder, whose layers are
``{encoder_layer}``. A rule whose parameters a model does not have is passed over, so that
one table serves models with and without biases, ties or experts. What is left without an entry is
found when a table is used: every parameter must be filled exactly once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from maxlm.models.families.entries import ParamSlice, TensorEntry
from maxlm.models.params import ParamSpec, flatten_names, param_specs
from maxlm.sharding import AxisRules

Array = np.ndarray


class ParamPiece(NamedTuple):
    """One of our parameters, or a layer's or an expert's part of it."""

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


NameTable = Mapping[str, TensorRule]


def list_entries(config: Any, table: NameTable) -> list[TensorEntry]:
    """Returns all tensors of a model under its family's names."""
    specs = flatten_names(param_specs(config.build(rules=AxisRules(), dtype=np.float32)))
    experts = config.moe.num_experts if config.moe else 0
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
            for expert in range(experts) if "{expert}" in name else (None,):
                full = name.format(layer=layer, expert=expert)
                at = (index,) if expert is None else (index, expert)
                found += _entry(full, rule, specs, ours, at)
    return found


def _entry(
    name: str, rule: TensorRule, specs: Mapping[str, ParamSpec], ours: tuple[str, ...], at: Any
) -> list[TensorEntry]:
    if any(own not in specs for own in ours):
        return []
    pieces = tuple(_piece(specs[own], len(at)) for own in ours)
    form = rule.form(pieces)
    places = tuple(ParamSlice(own, at) for own in ours)
    return [TensorEntry(name, form.shape, places, form.split, form.join, rule.aliases)]


def _piece(spec: ParamSpec, leading: int) -> ParamPiece:
    # An expert's inputs stand behind the expert axis, which an index may or may not have removed.
    inputs = 0 if not spec.contract else spec.contract[-1] + 1 - leading
    return ParamPiece(spec.shape[leading:], inputs)
