"""Kinds of layers by name, which a config's pattern lists in the order in which they
repeat; ``runs.py`` makes stacks and scans of them."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from maxlm.config import Config
from maxlm.models.blocks import (
    BranchScales,
    FeedForwardConfig,
    MixerConfig,
    Placement,
)
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.positions import PositionsConfig

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
