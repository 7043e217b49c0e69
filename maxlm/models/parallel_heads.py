"""Attention and another mixer side by side in one layer (Falcon-H1, arXiv 2507.22448,
§2.1; Hymba, arXiv 2411.13676)."""

from dataclasses import replace
from typing import Literal, Self

import jax
from flax import nnx
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.blocks import (
    MIXERS,
    MixerConfig,
    RegisteredMixer,
    build_attention,
    get_kind,
    normalizes_itself,
)
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.costs import LayerCosts, get_costs, prefix_names
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig


class ParallelHeadsConfig(Config):
    """Attention and another mixer that read one input, and whose outputs are added."""

    kind: Literal["parallel_heads"] = "parallel_heads"

    attention: AttentionConfig
    mixer: MixerConfig
    """The other mixer, by the kind it is registered with."""
    attention_input_scale: float = Field(default=1.0, gt=0)
    """Factor on what attention reads."""
    attention_output_scale: float = Field(default=1.0, gt=0)
    """Factor on what attention adds."""
    mixer_output_scale: float = Field(default=1.0, gt=0)
    """Factor on what the other mixer adds."""

    @model_validator(mode="after")
    def _mixers_differ(self) -> Self:
        if isinstance(self.mixer, ParallelHeadsConfig):
            raise MaxlmError(
                "parallel_heads within parallel_heads", fix="name another kind of mixer"
            )
        if normalizes_itself(self.mixer):
            message = f"mixer.kind={get_kind(self.mixer)} within parallel_heads"
            fix = "name a mixer that reads what attention reads"
            raise MaxlmError(message, where="mixer", fix=fix)
        return self

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns both mixers with small heads."""
        changes: dict[str, Config] = {
            "attention": self.attention.shrunk(head_dim, seq_len)
        }
        shrink = getattr(self.mixer, "shrunk", None)
        if shrink is not None:
            changes["mixer"] = shrink(head_dim, seq_len)
        return self.model_copy(update=changes)


class ParallelHeads(nnx.Module):
    """``attention(x) + mixer(x)``, each scaled; the cache is the pair of theirs."""

    name = "parallel"

    def __init__(
        self, config: ParallelHeadsConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.attention = build_attention(config.attention, norm, context)
        registered = MIXERS.get(get_kind(config.mixer))
        mixer = registered.build(config.mixer, norm, context)
        self.mixer_name = mixer.name
        setattr(self, mixer.name, mixer)

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        return tuple(
            tuple(f"{name}.{part}" for part in group)
            for name in ("attention", self.mixer_name)
            for group in getattr(getattr(self, name), "joint_projections", ())
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        attention_cache, mixer_cache = (None, None) if cache is None else cache
        mixer = getattr(self, self.mixer_name)
        config = self.config
        attended = self.attention(
            _scale(x, config.attention_input_scale), inputs, attention_cache
        )
        mixed = mixer(x, inputs, mixer_cache)
        y = _scale(mixed.y, config.mixer_output_scale)
        y = y + _scale(attended.y, config.attention_output_scale)
        caches = None if cache is None else (attended.cache, mixed.cache)
        return MixerOutput(y, caches, attended.aux.plus(mixed.aux))

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """A layer's caches; see :mod:`maxlm.models.caches`."""
        mixer = getattr(self, self.mixer_name)
        return (
            self.attention.cache_spec(layout, window),
            mixer.cache_spec(layout, window),
        )

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`."""
        attention = get_costs(self.attention)
        mixer = get_costs(getattr(self, self.mixer_name))
        matrices = (
            *prefix_names("attention", attention.matrices),
            *(
                replace(group, is_beside_attention=True)
                for group in prefix_names(self.mixer_name, mixer.matrices)
            ),
        )
        return replace(mixer, matrices=matrices, attention=attention.attention)


def _scale(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


PARALLEL_HEADS = RegisteredMixer(
    ParallelHeadsConfig, ParallelHeads, ("context", "stage")
)
"""The mesh axes are attention's; those of the other mixer are asked of its own kind."""
