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

from maxlm.models.families.entries import Entry, Place
from maxlm.models.params import ParamSpec, named, param_specs
from maxlm.sharding import AxisRules

Array = np.ndarray


class Piece(NamedTuple):
    """One of our parameters, or a layer's or an expert's part of it."""

    shape: tuple[int, ...]
    inputs: int
    """Leading dimensions that a map sums over; 0 of vectors and tables."""

    @property
    def rows(self) -> int:
        """Outputs of a map, or all elements of a vector."""
        return prod(self.shape[self.inputs :])


class Form(NamedTuple):
    """A tensor of theirs: its shape, and how it becomes pieces and is made of them."""

    shape: tuple[int, ...]
    split: Callable[[Array], Sequence[Array]]
    join: Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class Rule:
    ours: tuple[str, ...]
    form: Callable[[tuple[Piece, ...]], Form]
    aliases: tuple[str, ...] = ()


Table = Mapping[str, Rule]


def linear(*ours: str) -> Rule:
    """Matrices [outputs, inputs] as torch has them, several one above the other; or their biases,
    end to end."""

    def form(pieces: tuple[Piece, ...]) -> Form:
        stops = np.cumsum([piece.rows for piece in pieces])
        inputs = _inputs(pieces[0])

        def split(whole: Array) -> list[Array]:
            parts = np.split(whole, stops[:-1])
            return [_from_rows(part, piece) for part, piece in zip(parts, pieces, strict=True)]

        def join(parts: Sequence[Array]) -> Array:
            rows = [_to_rows(part, piece) for part, piece in zip(parts, pieces, strict=True)]
            return np.concatenate(rows) if len(rows) > 1 else rows[0]

        return Form((int(stops[-1]), *inputs), split, join)

    return Rule(ours, form)


def transposed(*ours: str) -> Rule:
    """Matrices [inputs, outputs] side by side (GPT-2's "Conv1D")."""

    def form(pieces: tuple[Piece, ...]) -> Form:
        upright = linear().form(pieces)
        shape = upright.shape[::-1]
        return Form(shape, lambda x: upright.split(x.T), lambda parts: upright.join(parts).T)

    return Rule(ours, form)


def grouped(query: str, key: str, value: str) -> Rule:
    """Queries, keys and values fused by kv head: each one's queries, then its key, its value."""

    def form(pieces: tuple[Piece, ...]) -> Form:
        q, k, _ = pieces
        inputs, size = _inputs(q), q.shape[-1]
        heads = k.shape[-2]
        group = q.shape[-2] // heads

        def split(whole: Array) -> list[Array]:
            whole = whole.reshape(heads, group + 2, size, *inputs)
            parts = whole[:, :group], whole[:, group], whole[:, group + 1]
            rows = [part.reshape(-1, *inputs) for part in parts]
            return [_from_rows(part, piece) for part, piece in zip(rows, pieces, strict=True)]

        def join(parts: Sequence[Array]) -> Array:
            rows = [
                _to_rows(part, piece).reshape(heads, -1, size, *inputs)
                for part, piece in zip(parts, pieces, strict=True)
            ]
            return np.concatenate(rows, axis=1).reshape(-1, *inputs)

        return Form((heads * (group + 2) * size, *inputs), split, join)

    return Rule((query, key, value), form)


def same(ours: str, *aliases: str) -> Rule:
    """A table or a vector as it is."""

    def form(pieces: tuple[Piece, ...]) -> Form:
        (piece,) = pieces
        return Form(piece.shape, lambda x: [x], lambda parts: parts[0])

    return Rule((ours,), form, aliases)


def row(ours: str) -> Rule:
    """A vector as a matrix of one row."""

    def form(pieces: tuple[Piece, ...]) -> Form:
        (piece,) = pieces
        return Form((1, *piece.shape), lambda x: [x[0]], lambda parts: parts[0][None])

    return Rule((ours,), form)


def head(ours: str, *aliases: str) -> Rule:
    """An output head [vocabulary, D]."""
    return Rule((ours,), linear(ours).form, aliases)


def entries(config: Any, table: Table) -> list[Entry]:
    """All tensors of a model under its family's names."""
    specs = named(param_specs(config.build(rules=AxisRules(), dtype=np.float32)))
    experts = config.moe.num_experts if config.moe else 0
    found: list[Entry] = []
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
    name: str, rule: Rule, specs: Mapping[str, ParamSpec], ours: tuple[str, ...], at: Any
) -> list[Entry]:
    if any(own not in specs for own in ours):
        return []
    pieces = tuple(_piece(specs[own], len(at)) for own in ours)
    form = rule.form(pieces)
    places = tuple(Place(own, at) for own in ours)
    return [Entry(name, form.shape, places, form.split, form.join, rule.aliases)]


def _piece(spec: ParamSpec, leading: int) -> Piece:
    # An expert's inputs stand behind the expert axis, which an index may or may not have removed.
    inputs = 0 if not spec.contract else spec.contract[-1] + 1 - leading
    return Piece(spec.shape[leading:], inputs)


def _inputs(piece: Piece) -> tuple[int, ...]:
    return (prod(piece.shape[: piece.inputs]),) if piece.inputs else ()


def _from_rows(rows: Array, piece: Piece) -> Array:
    return (rows.T if piece.inputs else rows).reshape(piece.shape)


def _to_rows(part: Array, piece: Piece) -> Array:
    if not piece.inputs:
        return part.reshape(-1)
    return part.reshape(*_inputs(piece), piece.rows).T
