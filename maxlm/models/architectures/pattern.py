"""Kinds of layers, and the order in which a model has them.

A config names kinds and the pattern in which they repeat. Layers with the same modules
have their parameters in one stack, and each run of whole periods is one scan, however
many stacks its layers take turns in.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from maxlm.config import Config
from maxlm.models.blocks import (
    BlockConfig,
    BranchScales,
    FeedForwardConfig,
    MixerConfig,
    Placement,
)
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.positions import PositionsConfig

LONGEST_PERIOD = 64
"""Most layers of a period that is looked for in a pattern that does not repeat from
layer 0 on. Published patterns have at most a dozen."""

LONGEST_SINGLE_PERIOD = 12
"""Most layers of a pattern that is one period even if it never repeats, so that a
shallow model's parameters have the names of a deeper one's. A longer pattern is a list
of layers. Published periods have at most 8."""

KindName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


def _get_choice_tag(value: object) -> str:
    return "name" if isinstance(value, str) else "config"


MixerChoice = Annotated[
    Annotated[Literal["none"], Tag("name")] | Annotated[MixerConfig, Tag("config")],
    Discriminator(_get_choice_tag),
]
"""A mixer by the kind it is registered with, or none."""
FeedForwardChoice = Annotated[
    Annotated[Literal["none"], Tag("name")]
    | Annotated[FeedForwardConfig, Tag("config")],
    Discriminator(_get_choice_tag),
]
"""A feed-forward by the kind it is registered with, or none."""
KindFeedForwardChoice = Annotated[
    Annotated[Literal["mlp", "moe", "none"], Tag("name")]
    | Annotated[FeedForwardConfig, Tag("config")],
    Discriminator(_get_choice_tag),
]
"""The same, or the model's ``mlp`` or ``moe`` by that name."""


class LayerKind(Config):
    """Settings in which one layer of a pattern differs from the others."""

    window: int | None = Field(default=None, gt=0)
    """Keys that its attention sees; null: all before it."""
    positions: PositionsConfig | None = None
    """Positions in place of the model's; `kind: none` leaves them out."""
    attention: AttentionConfig | None = None
    """Attention in place of the model's mixer."""
    keys_of: KindName | None = None
    """Kind of the layer whose keys and values its attention reads, in place of its own:
    of layers of this kind, the last before it (Gemma 3n)."""
    mixer: MixerChoice | None = None
    """A mixer in place of the model's, by the kind it is registered with; none: the
    layer is a feed-forward alone."""
    mlp: MlpConfig | None = None
    """An MLP in place of the model's feed-forward."""
    ffn: KindFeedForwardChoice | None = None
    """A feed-forward in place of the model's: mlp or moe (those of the model), one by
    the kind it is registered with, or none: the layer is a mixer alone."""
    norm: NormConfig | None = None
    """Norms in place of the model's."""
    placement: Placement | None = None
    """Placement of norms in place of the model's."""
    mixer_scales: BranchScales = BranchScales()
    """Factors on what the mixer's output is added to, and on the output (MiniMax-01)."""
    ffn_scales: BranchScales = BranchScales()
    """The same of the feed-forward."""


PatternEntry = Annotated[
    Annotated[KindName, Tag("name")] | Annotated[LayerKind, Tag("config")],
    Discriminator(_get_choice_tag),
]
"""A kind by its name, or its settings."""


def suggest_kind(name: str, kinds: Mapping[str, LayerKind]) -> str:
    """Returns what to do about a kind that is not there, with a near name."""
    near = get_close_matches(name, kinds, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "give its settings in model.kinds"


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


def make_run(name: str, period: Sequence[PatternLayer], num_periods: int) -> LayerRun:
    """Joins the layers of a period, repeated so often, to a run. A run of layers alike
    in their modules has one stack of its own name; others have a stack for each sort,
    ``run.kind``, by the name of the first kind that has it."""
    blocks = list(dict.fromkeys(layer.block for layer in period))
    turns = tuple(blocks.index(layer.block) for layer in period)
    names: list[str] = []
    for turn in range(len(blocks)):
        first = period[turns.index(turn)]
        stack_name = name
        if len(blocks) > 1:
            # A kind may be there with the dense feed-forward of first layers, too.
            stack_name = f"{name}.{first.kind_name or 'plain'}"
            while stack_name in names:
                stack_name += "_"
        names.append(stack_name)
    stacks = []
    for index, block in enumerate(blocks):
        kinds = tuple(
            layer.kind
            for layer, turn in zip(period, turns, strict=True)
            if turn == index
        )
        num_layers = len(kinds) * num_periods
        stacks.append(LayerStack(names[index], num_layers, kinds, block))
    return LayerRun(
        name,
        num_layers=len(period) * num_periods,
        kinds=tuple(layer.kind for layer in period),
        stacks=tuple(stacks),
        turns=turns,
        kind_names=tuple(layer.kind_name for layer in period),
    )


def make_shortest_run(name: str, layers: Sequence[PatternLayer]) -> LayerRun:
    """Joins layers to a run of their shortest period that repeats wholly."""
    for period in range(1, len(layers)):
        num_periods, num_left = divmod(len(layers), period)
        if not num_left and list(layers[:period]) * num_periods == list(layers):
            return make_run(name, layers[:period], num_periods)
    return make_run(name, layers, 1)


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
