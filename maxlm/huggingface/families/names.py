"""The vocabulary of name tables: how one of their tensors is made of our parameters.

A table maps a tensor's name to a rule, and a rule names the parameters. Names may hold
``{layer}`` and ``{expert}``; parameters of layers are named as within one
(``attention.query.kernel``), all others by their full name, and so are those of an
encoder beside a decoder, whose layers are ``{encoder_layer}``. A rule whose parameters
a model does not have is passed over, so that one table serves models with and without
biases, ties or experts. What is left without an entry is found when a table is used:
every parameter must be filled exactly once.
"""

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.runs import LayerPlace, LayerRun
from maxlm.models.params import ParamSpec, flatten_names, param_specs
from maxlm.sharding import AxisRules

Array = np.ndarray


class ParamSlice(NamedTuple):
    """A parameter, or the part of it that belongs to one layer (and one expert)."""

    name: str
    """Canonical, as in "layers.attention.query.kernel"."""
    index: tuple[int, ...] = ()
    """Leading indices: the layer, and maybe the expert; none for all of the
    parameter."""


class ParamShape(NamedTuple):
    """The shape of a parameter, or of a slice."""

    shape: tuple[int, ...]
    num_input_dims: int
    """Leading dimensions that a map sums over; 0 of vectors and tables."""


class TensorConversion(NamedTuple):
    """A published tensor: its shape, and its split into pieces of ours and their
    join."""

    shape: tuple[int, ...]
    split: Callable[[Array], Sequence[Array]]
    join: Callable[[Sequence[Array]], Array]


@dataclass(frozen=True)
class TensorRule:
    ours: tuple[str, ...]
    make_conversion: Callable[[tuple[ParamShape, ...]], TensorConversion]
    aliases: tuple[str, ...] = ()
    alternative: "TensorRule | None" = None
    """The rule in layers that do not have these parameters."""
    layer: int | None = None
    """Number of the layer that has these parameters, where the tensor's name does not
    say it."""


@dataclass(frozen=True)
class TensorEntry:
    """One published tensor, and the parameters of ours that it holds.

    ``split`` and ``join`` are pure, see fp32, and may return views of what they were
    given.
    """

    theirs: str
    """Full name in the safetensors files."""
    shape: tuple[int, ...]
    """Shape in those files."""
    ours: tuple[ParamSlice, ...]
    split: Callable[[Array], Sequence[Array]] = lambda tensor: (tensor,)
    """Splits theirs into an array a place, in the shape of the parameter at its
    index."""
    join: Callable[[Sequence[Array]], Array] = lambda parts: parts[0]
    """Joins what ``split`` splits."""
    aliases: tuple[str, ...] = ()
    """Names under which the same tensor may be stored again (tied heads)."""
    copies: tuple[str, ...] = ()
    """Names under which files hold the tensor again for others to read."""
    rule: TensorRule | None = None
    pieces: tuple[ParamShape, ...] = ()
    """Shapes of ``ours``, which ``rule`` made the entry of."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a map's inputs, or of a table's rows."""
        piece = self.pieces[0]
        # A table sums over none: all its dimensions but the last are rows.
        num_dims = piece.num_input_dims or len(piece.shape) - 1
        return piece.shape[:num_dims]

    def convert_outputs(self) -> TensorConversion:
        """Returns the conversion of a vector with a number for each of a map's
        outputs."""
        assert self.rule is not None
        num_inputs = len(self.input_shape)
        outputs = [piece.shape[num_inputs:] for piece in self.pieces]
        vectors = tuple(ParamShape(shape, 0) for shape in outputs)
        return self.rule.make_conversion(vectors)


NameTable = Mapping[str, TensorRule]

QKV = ("attention.query", "attention.key", "attention.value")
QKV_KERNELS = tuple(f"{name}.kernel" for name in QKV)
QKV_BIASES = tuple(f"{name}.bias" for name in QKV)


def linear(*ours: str) -> TensorRule:
    """Returns the rule of matrices [outputs, inputs] as torch has them, one above the
    other; or of their biases, end to end."""
    return TensorRule(ours, lambda pieces: _stack_rows(pieces, 1))


def interleave_by_kv_head(*ours: str) -> TensorRule:
    """Returns the rule of maps of one input, fused by kv head: for each, its rows of
    every map, those of queries for all heads that it serves."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        num_kv_heads = pieces[1].shape[-2]  # of [..., K, H]
        return _stack_rows(pieces, num_kv_heads)

    return TensorRule(ours, make_conversion)


def interleave_rows(groups: int, *ours: str) -> TensorRule:
    """Returns the rule of maps of one input, fused by ``groups`` equal groups of
    outputs: for each, its rows of every map."""
    return TensorRule(ours, lambda pieces: _stack_rows(pieces, groups))


def _stack_rows(pieces: tuple[ParamShape, ...], groups: int) -> TensorConversion:
    """Returns the conversion of a matrix [rows, inputs] whose ``groups`` equal parts of
    rows hold each a share of every piece, one above the other."""
    first = pieces[0]
    # Of biases and other vectors there are no inputs: [rows]; else [rows, inputs].
    inputs: tuple[int, ...] = ()
    if first.num_input_dims:
        inputs = (prod(first.shape[: first.num_input_dims]),)
    outputs = [prod(piece.shape[piece.num_input_dims :]) for piece in pieces]
    # Where each piece's rows end within a group.
    stops = np.cumsum([size // groups for size in outputs])

    def split_rows(whole: Array) -> list[Array]:
        # [groups · rows of all, inputs] → for each piece [rows, inputs] → ours, with
        # inputs first.
        by_group = whole.reshape(groups, -1, *inputs)
        parts = np.split(by_group, stops[:-1], axis=1)
        split: list[Array] = []
        for part, piece in zip(parts, pieces, strict=True):
            rows = part.reshape(-1, *inputs)
            split.append(rows.T.reshape(piece.shape))
        return split

    def join_rows(parts: Sequence[Array]) -> Array:
        by_group: list[Array] = []
        for part in parts:
            rows = part.reshape(*inputs, -1).T
            by_group.append(rows.reshape(groups, -1, *inputs))
        # One alone stays a view.
        joined = np.concatenate(by_group, axis=1) if len(by_group) > 1 else by_group[0]
        return joined.reshape(-1, *inputs)

    num_rows = groups * int(stops[-1])
    return TensorConversion((num_rows, *inputs), split_rows, join_rows)


def join_rules(*rules: TensorRule, axis: int) -> TensorRule:
    """Returns the rule of tensors side by side along an axis of theirs."""
    return _combine_rules(rules, axis, is_stacked=False)


def stack_rules(*rules: TensorRule) -> TensorRule:
    """Returns the rule of tensors alike along a first axis of their number."""
    return _combine_rules(rules, 0, is_stacked=True)


def _combine_rules(
    rules: Sequence[TensorRule], axis: int, *, is_stacked: bool
) -> TensorRule:
    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        conversions: list[TensorConversion] = []
        start = 0
        for rule in rules:
            stop = start + len(rule.ours)
            conversions.append(rule.make_conversion(pieces[start:stop]))
            start = stop
        stops = np.cumsum([conversion.shape[axis] for conversion in conversions])
        shape = [*conversions[0].shape]
        if is_stacked:
            shape.insert(0, len(conversions))
        else:
            shape[axis] = int(stops[-1])

        def split(whole: Array) -> list[Array]:
            if is_stacked:
                parts = list(whole)
            else:
                parts = np.split(whole, stops[:-1], axis=axis)
            split: list[Array] = []
            for conversion, part in zip(conversions, parts, strict=True):
                split += conversion.split(part)
            return split

        def join(parts: Sequence[Array]) -> Array:
            joined: list[Array] = []
            start = 0
            for rule, conversion in zip(rules, conversions, strict=True):
                stop = start + len(rule.ours)
                joined.append(conversion.join(parts[start:stop]))
                start = stop
            if is_stacked:
                return np.stack(joined)
            return np.concatenate(joined, axis=axis)

        return TensorConversion(tuple(shape), split, join)

    ours = tuple(name for rule in rules for name in rule.ours)
    return TensorRule(ours, make_conversion)


def map_linear(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a linear map with a bias."""
    return {
        f"{theirs}.weight": linear(f"{ours}.kernel"),
        f"{theirs}.bias": linear(f"{ours}.bias"),
    }


def map_linears(theirs: str, ours: str, **names: str) -> NameTable:
    """Returns the entries of a module's linear maps, whose names there are keywords."""
    table: dict[str, TensorRule] = {}
    for their_name, our_name in names.items():
        table |= map_linear(f"{theirs}.{their_name}", f"{ours}.{our_name}")
    return table


def map_norm(theirs: str, ours: str) -> NameTable:
    """Returns the entries of a LayerNorm with a bias."""
    return {
        f"{theirs}.weight": copy(f"{ours}.scale"),
        f"{theirs}.bias": copy(f"{ours}.bias"),
    }


def transpose(*ours: str) -> TensorRule:
    """Returns the rule of matrices [inputs, outputs] side by side (GPT-2's
    "Conv1D")."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        shape, split_rows, join_rows = _stack_rows(pieces, 1)
        return TensorConversion(
            shape[::-1],
            lambda tensor: split_rows(tensor.T),
            lambda parts: join_rows(parts).T,
        )

    return TensorRule(ours, make_conversion)


def copy(ours: str, *aliases: str, as_row: bool = False) -> TensorRule:
    """Returns the rule of a table or a vector as it is, or as a matrix of one row."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        our_shape = pieces[0].shape
        shape = (1, *our_shape) if as_row else our_shape
        return TensorConversion(
            shape,
            lambda tensor: [tensor.reshape(our_shape)],
            lambda parts: parts[0].reshape(shape),
        )

    return TensorRule((ours,), make_conversion, aliases)


def copy_with_ones(ours: str, *, before: int, behind: int) -> TensorRule:
    """Returns the rule of a vector or table with so many dimensions of one before and
    behind its own."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        our_shape = pieces[0].shape
        shape = ((1,) * before) + our_shape + ((1,) * behind)
        return TensorConversion(
            shape,
            lambda tensor: [tensor.reshape(our_shape)],
            lambda parts: parts[0].reshape(shape),
        )

    return TensorRule((ours,), make_conversion)


def depthwise(*ours: str) -> TensorRule:
    """Returns the rule of convolutions of each channel by itself, [channels, 1, width]
    as torch has them, one above the other; ours are [..., width]."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        width = pieces[0].shape[-1]
        channels = [prod(piece.shape[:-1]) for piece in pieces]
        stops = np.cumsum(channels)

        def split_channels(whole: Array) -> list[Array]:
            parts = np.split(whole, stops[:-1])
            return [
                part.reshape(piece.shape)
                for part, piece in zip(parts, pieces, strict=True)
            ]

        def join_channels(parts: Sequence[Array]) -> Array:
            return np.concatenate([part.reshape(-1, 1, width) for part in parts])

        shape = (int(stops[-1]), 1, width)
        return TensorConversion(shape, split_channels, join_channels)

    return TensorRule(ours, make_conversion)


def either(first: TensorRule, second: TensorRule) -> TensorRule:
    """Returns the first rule, and the second for layers that have not the parameters of
    the first: what one name means in layers of different kinds."""
    return replace(first, alternative=second)


def permute_rotary(
    rule: TensorRule,
    rotary_dim: int,
    *,
    each_head: bool,
    first: bool = False,
    head_dim: int | None = None,
) -> TensorRule:
    """Returns the rule with the last (or the ``first``) ``rotary_dim`` rows of each
    head, or of all, reordered: theirs pair neighbours, ours halves. ``head_dim``: rows
    of a head where that is not the parameter's last dimension."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        plain = rule.make_conversion(pieces)
        rows_of_each = head_dim or pieces[-1].shape[-1]
        rows_per_head = rows_of_each if each_head else plain.shape[0]
        # Ours in terms of theirs: the first of each pair, then the second of each.
        order = np.arange(rows_per_head)
        rotary_rows = slice(rotary_dim) if first else slice(-rotary_dim, None)
        pairs = order[rotary_rows].reshape(-1, 2)
        order[rotary_rows] = pairs.T.ravel()
        inverse_order = np.argsort(order)

        def reorder(rows: Array, order: Array) -> Array:
            by_head = rows.reshape(-1, rows_per_head, *rows.shape[1:])
            return by_head[:, order].reshape(rows.shape)

        return TensorConversion(
            plain.shape,
            lambda whole: plain.split(reorder(whole, order)),
            lambda parts: reorder(plain.join(parts), inverse_order),
        )

    return TensorRule(rule.ours, make_conversion)


def swap_halves(rule: TensorRule) -> TensorRule:
    """Returns the rule with the two halves of each head's rows in the other order."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        plain = rule.make_conversion(pieces)
        head_dim = pieces[-1].shape[-1]

        def swap(rows: Array) -> Array:
            by_half = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
            return by_half[:, ::-1].reshape(rows.shape)

        return TensorConversion(
            plain.shape,
            lambda whole: plain.split(swap(whole)),
            lambda parts: swap(plain.join(parts)),
        )

    return TensorRule(rule.ours, make_conversion)


def split_heads(rule: TensorRule) -> TensorRule:
    """Returns the rule of vectors with the rows of each head as a row of a matrix
    [heads, rows]."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        plain = rule.make_conversion(pieces)
        return TensorConversion(
            pieces[0].shape,
            lambda whole: plain.split(whole.reshape(plain.shape)),
            lambda parts: plain.join(parts).reshape(pieces[0].shape),
        )

    return TensorRule(rule.ours, make_conversion)


def unstack_experts(ours: str, *, same_orientation: bool) -> TensorRule:
    """Returns all experts' matrices, one above the other, each [d_ff, D]; ours are [E,
    d_ff, D] too or, of another orientation, [E, D, d_ff]."""
    axes = (0, 1, 2) if same_orientation else (0, 2, 1)

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        num_experts, d_ff, d_model = (pieces[0].shape[axis] for axis in axes)
        num_rows = num_experts * d_ff
        # Swapping two axes is its own inverse.
        return TensorConversion(
            (num_rows, d_model),
            lambda whole: [whole.reshape(num_experts, d_ff, d_model).transpose(axes)],
            lambda parts: parts[0].transpose(axes).reshape(num_rows, d_model),
        )

    return TensorRule((ours,), make_conversion)


def take_turns(*ours: str) -> TensorRule:
    """Returns the rule of arrays [..., F] whose last dimensions take turns in one
    [..., n · F]: the first number of each, then the second of each."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        *lead, width = pieces[0].shape
        shape = (*lead, len(pieces) * width)
        return TensorConversion(
            shape,
            lambda whole: [whole[..., i :: len(pieces)] for i in range(len(pieces))],
            lambda parts: np.stack(parts, axis=-1).reshape(shape),
        )

    return TensorRule(ours, make_conversion)


def join_experts(*ours: str, inputs_first: bool) -> TensorRule:
    """Returns the rule of all experts' matrices in one tensor, ours [E, inputs, outputs]
    each: [E, inputs, outputs of each, side by side], or of another orientation [E,
    outputs of each, one above the other, inputs]."""

    def make_conversion(pieces: tuple[ParamShape, ...]) -> TensorConversion:
        num_experts, inputs, outputs = pieces[0].shape
        shape = (num_experts, inputs, len(pieces) * outputs)
        axes = (0, 1, 2) if inputs_first else (0, 2, 1)
        # Swapping two axes is its own inverse.
        return TensorConversion(
            tuple(shape[axis] for axis in axes),
            lambda whole: np.split(whole.transpose(axes), len(pieces), axis=2),
            lambda parts: np.concatenate(parts, axis=2).transpose(axes),
        )

    return TensorRule(ours, make_conversion)


class _LayerPlace(NamedTuple):
    """Where a layer's parameters lie, and what numbers its names hold."""

    stack: str
    index: int
    layer: int
    module: int = 0


def list_entries(
    config: TransformerConfig, table: NameTable, module_table: NameTable | None = None
) -> list[TensorEntry]:
    """Returns all tensors of a model under its family's names; ``module_table``: those
    of the modules of ``mtp``, whose names may hold ``{module}``."""
    model = config.build(rules=AxisRules(), dtype=np.float32)
    specs = flatten_names(param_specs(model))
    experts = range(config.moe.num_experts if config.moe else 0)
    encoder_layers = sum(
        trunk.num_layers for trunk in config.trunks if trunk.is_encoder
    )
    places = [
        _LayerPlace(place.stack.name, place.index, layer)
        for layer, place in enumerate(_iterate_places(config.layer_runs))
    ]
    module_places = [
        _LayerPlace(place.stack.name, place.index, config.num_layers + module, module)
        for module, place in enumerate(_iterate_places(config.mtp_runs))
    ]
    entries: list[TensorEntry] = []
    for name, rule in table.items():
        if "{encoder_layer}" in name:
            for layer in range(encoder_layers):
                full_name = name.format(encoder_layer=layer)
                entries += _make_entry(full_name, rule, specs, rule.ours, (layer,))
            continue
        if rule.layer is not None:
            place = places[rule.layer]
            ours = tuple(f"{place.stack}.{parameter}" for parameter in rule.ours)
            entries += _make_entry(name, rule, specs, ours, (place.index,))
            continue
        if "{layer}" not in name:
            entries += _make_entry(name, rule, specs, rule.ours, ())
            continue
        for place in places:
            entries += _make_layer_entries(name, rule, specs, place, experts)
    for name, rule in (module_table or {}).items():
        for place in module_places:
            entries += _make_layer_entries(name, rule, specs, place, experts)
    return _drop_taken_aliases(entries)


def _iterate_places(runs: Iterable[LayerRun]) -> Iterator[LayerPlace]:
    for run in runs:
        yield from run.iterate_places()


def _make_layer_entries(
    name: str,
    rule: TensorRule,
    specs: Mapping[str, ParamSpec],
    place: _LayerPlace,
    experts: Iterable[int],
) -> list[TensorEntry]:
    """Returns the entries of a layer's tensor: one, or one an expert; none where the
    layer has no such parameters."""
    stack, index, layer, module = place
    layer_rule = _choose_rule(rule, stack, specs)
    ours = tuple(f"{stack}.{parameter}" for parameter in layer_rule.ours)
    if "{expert}" not in name:
        full_name = name.format(layer=layer, module=module)
        return _make_entry(full_name, layer_rule, specs, ours, (index,))
    entries: list[TensorEntry] = []
    for expert in experts:
        full_name = name.format(layer=layer, module=module, expert=expert)
        entries += _make_entry(full_name, layer_rule, specs, ours, (index, expert))
    return entries


def _choose_rule(
    rule: TensorRule, stack: str, specs: Mapping[str, ParamSpec]
) -> TensorRule:
    """Returns the first of a rule and its alternatives whose parameters the layers of a
    stack have, or the last."""
    while rule.alternative is not None:
        if all(f"{stack}.{parameter}" in specs for parameter in rule.ours):
            break
        rule = rule.alternative
    return rule


def _drop_taken_aliases(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Returns entries without aliases that are another entry's name: an untied head is
    no other name of the table."""
    names = {entry.theirs for entry in entries}
    return [
        replace(
            entry,
            aliases=tuple(alias for alias in entry.aliases if alias not in names),
        )
        for entry in entries
    ]


def drop_copies(
    entries: Iterable[TensorEntry], names: Collection[str]
) -> list[TensorEntry]:
    """Returns entries without the copies of some names."""
    shortened: list[TensorEntry] = []
    for entry in entries:
        copies = tuple(name for name in entry.copies if name not in names)
        shortened.append(replace(entry, copies=copies))
    return shortened


def _make_entry(
    name: str,
    rule: TensorRule,
    specs: Mapping[str, ParamSpec],
    ours: tuple[str, ...],
    lead_index: tuple[int, ...],
) -> list[TensorEntry]:
    """Returns the entry of a tensor; none where the model has no such parameters."""
    if any(parameter not in specs for parameter in ours):
        return []
    pieces = tuple(_get_shape(specs[name], len(lead_index)) for name in ours)
    conversion = rule.make_conversion(pieces)
    entry = TensorEntry(
        name,
        conversion.shape,
        tuple(ParamSlice(parameter, lead_index) for parameter in ours),
        split=conversion.split,
        join=conversion.join,
        aliases=rule.aliases,
        rule=rule,
        pieces=pieces,
    )
    return [entry]


def _get_shape(spec: ParamSpec, num_lead_axes: int) -> ParamShape:
    """Returns the shape of a parameter's slice at that many leading indices."""
    num_input_dims = 0
    if spec.contracting_dims:
        # An expert's inputs stand behind the expert axis, which an index may or may not
        # have removed.
        num_input_dims = spec.contracting_dims[-1] + 1 - num_lead_axes
    return ParamShape(spec.shape[num_lead_axes:], num_input_dims)
