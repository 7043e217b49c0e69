"""Runs of layers: what a model's list of layers is stored and compiled as.

Layers with the same modules have their parameters in one stack. A run is layers that
follow one another in whole periods: one scan, however many stacks they take turns in.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.blocks import BlockConfig

LONGEST_PERIOD = 64
"""Most layers of a period that is looked for in a pattern that does not repeat from
layer 0 on. Published patterns have at most a dozen."""

LONGEST_SINGLE_PERIOD = 12
"""Most layers of a pattern that is one period even if it never repeats, so that a
shallow model's parameters have the names of a deeper one's. A longer pattern is a list
of layers. Published periods have at most 8."""

STACKS = ("first_layers", "layers", "last_layers")
"""Names that runs of layers may have, and the stacks of those with one."""


def strip_stack_name(name: str, stack: str = "") -> str:
    """Returns a parameter's name without its stack's: ``layers.full.mlp.up`` →
    ``mlp.up``; of any stack with a run of its own: ``first_layers.mlp.up`` →
    ``mlp.up``."""
    if stack:
        return name.removeprefix(f"{stack}.")
    return ".".join(word for word in name.split(".") if word not in STACKS)


class PatternLayer(NamedTuple):
    """One layer of a model before it is built."""

    kind: LayerKind
    block: BlockConfig
    kind_name: str
    """The name that the config gives the kind; "" where it has none."""


class LayerStack(NamedTuple):
    """Layers with the same modules, whose parameters lie in one stack."""

    name: str
    num_layers: int
    kinds: tuple[LayerKind, ...]
    """Kinds of its layers, by turns; ``num_layers`` is a multiple of their number."""
    block: BlockConfig
    """What each of its layers is built of."""


class LayerPlace(NamedTuple):
    """Where one layer of a run is found."""

    stack: LayerStack
    index: int
    """Its index in the stack."""
    kind_index: int
    """Its place in the period."""


class LayerRun(NamedTuple):
    """Layers that follow one another, in whole periods: one scan."""

    name: str
    """What the names of its stacks begin with. Runs before the main one may have one
    name, and those behind it; each stack is of one run."""
    num_layers: int
    kinds: tuple[LayerKind, ...]
    """Kinds of a period's layers."""
    stacks: tuple[LayerStack, ...]
    turns: tuple[int, ...]
    """For each layer of a period, the index of its stack."""
    kind_names: tuple[str, ...]
    """The names of ``kinds`` in the config; "" for one without."""

    def iterate_places(self) -> Iterator[LayerPlace]:
        """Yields the place of each layer, in the order in which they are run."""
        taken = [0] * len(self.stacks)
        for layer in range(self.num_layers):
            kind_index = layer % len(self.turns)
            turn = self.turns[kind_index]
            yield LayerPlace(self.stacks[turn], taken[turn], kind_index)
            taken[turn] += 1


class TrunkSpec(NamedTuple):
    """A trunk's layers, and the tokens that their attention sees."""

    runs: tuple[LayerRun, ...]
    prefix: str = ""
    """Prefix of its parameters' names."""
    causal: bool = True
    """Whether tokens see those before them alone."""
    is_encoder: bool = False
    """Whether its tokens are an encoder's, beside a decoder's."""
    cross_attention: bool = False
    """Whether layers look at an encoder's output as well."""

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        return tuple(stack for run in self.runs for stack in run.stacks)

    @property
    def num_layers(self) -> int:
        return sum(run.num_layers for run in self.runs)


def make_runs(
    first: Sequence[PatternLayer], period: Sequence[PatternLayer], num_layers: int
) -> tuple[LayerRun, ...]:
    """Makes the runs of a model, first to last. The main one, ``layers``, repeats its
    period as often as it goes; what stands before and after has its own, so that each
    is whole periods.

    Args:
        first: layers that are no part of the pattern, before all others.
        period: the pattern's layers; where it is a long list of all of them, the part
            that repeats is the main run.
        num_layers: layers behind ``first``.
    """
    first_name, main_name, last_name = STACKS
    period = period[:num_layers]  # one longer than the model is cut
    num_periods, num_left = divmod(num_layers, len(period))
    last = period[:num_left]

    are_unlike = len({layer.block for layer in period}) > 1
    is_list = num_periods == 1 and len(period) > LONGEST_SINGLE_PERIOD
    if are_unlike and is_list:
        # A list of all layers: some part of it may repeat all the same.
        layers = [*first, *period, *last]
        repeats = find_repeats(layers)
        first = layers[: repeats.start]
        period = layers[repeats.start :][: repeats.period]
        num_periods = repeats.num_periods
        last = layers[repeats.stop :]

    return (
        *make_outer_runs(first_name, first),
        make_run(main_name, period, num_periods),
        *make_outer_runs(last_name, last),
    )


def name_stacks(name: str, layers: Sequence[PatternLayer]) -> dict[BlockConfig, str]:
    """Names the stacks of layers by what these are built of: layers alike in their
    modules have one of the name itself; others have a stack for each sort,
    ``name.kind``, by the name of the first kind that has it."""
    first_layers: dict[BlockConfig, PatternLayer] = {}
    for layer in layers:
        first_layers.setdefault(layer.block, layer)
    if len(first_layers) == 1:
        return dict.fromkeys(first_layers, name)
    names: dict[BlockConfig, str] = {}
    for block, layer in first_layers.items():
        stack_name = f"{name}.{layer.kind_name or 'plain'}"
        # A kind may be there with the dense feed-forward of first layers, too.
        while stack_name in names.values():
            stack_name += "_"
        names[block] = stack_name
    return names


def make_run(
    name: str,
    period: Sequence[PatternLayer],
    num_periods: int,
    stack_names: Mapping[BlockConfig, str] | None = None,
) -> LayerRun:
    """Joins the layers of a period, repeated so often, to a run. ``stack_names``: of
    its stacks; None: those of :func:`name_stacks`."""
    if stack_names is None:
        stack_names = name_stacks(name, period)
    blocks = list(dict.fromkeys(layer.block for layer in period))
    turns = tuple(blocks.index(layer.block) for layer in period)
    stacks = []
    for index, block in enumerate(blocks):
        kinds = tuple(
            layer.kind
            for layer, turn in zip(period, turns, strict=True)
            if turn == index
        )
        num_layers = len(kinds) * num_periods
        stacks.append(LayerStack(stack_names[block], num_layers, kinds, block))
    return LayerRun(
        name,
        num_layers=len(period) * num_periods,
        kinds=tuple(layer.kind for layer in period),
        stacks=tuple(stacks),
        turns=turns,
        kind_names=tuple(layer.kind_name for layer in period),
    )


def make_outer_runs(name: str, layers: Sequence[PatternLayer]) -> list[LayerRun]:
    """Joins the layers before or behind the main run to as few bodies as go without
    another stack: to one run of their shortest period, or to several where these share
    no stack. (A scan over a part of a stack would copy it.)"""
    if not layers:
        return []
    period = find_shortest_period(layers)
    if period < len(layers):
        return [make_run(name, layers[:period], len(layers) // period)]
    parts = split_by_stack(layers)
    periods = [find_shortest_period(part) for part in parts]
    if all(period == len(part) for part, period in zip(parts, periods, strict=True)):
        return [make_run(name, layers, 1)]
    stack_names = name_stacks(name, layers)
    return [
        make_run(name, part[:period], len(part) // period, stack_names)
        for part, period in zip(parts, periods, strict=True)
    ]


def find_shortest_period(layers: Sequence[PatternLayer]) -> int:
    """Returns the number of layers of the shortest period that repeats wholly: at most
    all of them."""
    for period in range(1, len(layers)):
        num_periods, num_left = divmod(len(layers), period)
        if not num_left and list(layers[:period]) * num_periods == list(layers):
            return period
    return len(layers)


def split_by_stack(layers: Sequence[PatternLayer]) -> list[Sequence[PatternLayer]]:
    """Splits layers into as many parts as have no stack in common."""
    last_index = {layer.block: index for index, layer in enumerate(layers)}
    parts: list[Sequence[PatternLayer]] = []
    start = 0
    end = 0
    for index, layer in enumerate(layers):
        end = max(end, last_index[layer.block])
        if index == end:
            parts.append(layers[start : end + 1])
            start = end + 1
    return parts


class Repeats(NamedTuple):
    """Layers of a list that repeat with a period."""

    start: int
    period: int
    num_periods: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.num_periods


def find_repeats(layers: Sequence[PatternLayer]) -> Repeats:
    """Returns the part of a list of layers whose scan saves the most bodies: the most
    layers beyond those of one period, the shortest such period, the first such part."""
    # Numbers of equal layers are equal, and faster to compare than their settings.
    number_of_layer: dict[PatternLayer, int] = {}
    numbers = [
        number_of_layer.setdefault(layer, len(number_of_layer)) for layer in layers
    ]
    best = Repeats(0, len(layers), 1)
    best_saving = 0
    longest = min(LONGEST_PERIOD, len(layers) // 2)
    for period in range(1, longest + 1):
        num_equal = 0
        for last in range(period, len(layers)):
            is_equal = numbers[last] == numbers[last - period]
            num_equal = num_equal + 1 if is_equal else 0
            num_periods = num_equal // period + 1
            saving = (num_periods - 1) * period
            if saving > best_saving:
                best_saving = saving
                first = last - num_equal - period + 1
                best = Repeats(first, period, num_periods)
    return best
