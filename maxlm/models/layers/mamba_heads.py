"""Several of Mamba's mixers side by side, each with channels of its own (Zamba, Glorioso
et al. 2024, arXiv 2405.16712, as its published code has it)."""

from dataclasses import fields, replace
from typing import Literal, Self

import jax
from flax import nnx
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.costs import LayerCosts, MatrixGroup, prefix_names
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.mamba import Mamba, MambaConfig
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig


class MambaHeadsConfig(Config):
    """Mamba's mixers that read one input, and whose outputs are added."""

    kind: Literal["mamba_heads"] = "mamba_heads"

    num_heads: int = Field(default=2, gt=0)
    head: MambaConfig
    """One of them; ``d_inner`` are its own channels."""

    @model_validator(mode="after")
    def _offsets_fit(self) -> Self:
        if self.head.bias:
            message = "offsets on each head's output, which are added up"
            raise MaxlmError(message, where="head.bias", fix="set it to false")
        return self

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns as many small mixers, two at most."""
        changes = {
            "num_heads": min(self.num_heads, 2),
            "head": self.head.shrunk(head_dim, seq_len),
        }
        return self.model_copy(update=changes)


class MambaHeads(nnx.Module):
    """``Σ head(x)``. Parameters: those of a :class:`Mamba` each, ``head0`` and so on; the
    cache is a tuple of theirs."""

    name = "mamba_heads"

    def __init__(
        self, config: MambaHeadsConfig, norm: NormConfig, context: BuildContext
    ):
        self.head_names = tuple(f"head{number}" for number in range(config.num_heads))
        for name in self.head_names:
            setattr(self, name, Mamba(config.head, norm, context))

    @property
    def heads(self) -> list[Mamba]:
        """The mixers, in their order."""
        return [getattr(self, name) for name in self.head_names]

    @property
    def joint_projections(self) -> tuple[tuple[str, ...], ...]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        return tuple(
            tuple(f"{name}.{part}" for part in group)
            for name in self.head_names
            for group in Mamba.joint_projections
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        caches = [None] * len(self.head_names) if cache is None else cache
        first, *others = (
            head(x, inputs, head_cache)
            for head, head_cache in zip(self.heads, caches, strict=True)
        )
        y = first.y
        for output in others:
            y = y + output.y
        if cache is None:
            return MixerOutput(y)
        return MixerOutput(y, (first.cache, *(output.cache for output in others)))

    def cache_spec(self, layout: CacheLayout, window: int | None) -> LayerCache:
        """A layer's caches; see :mod:`maxlm.models.caches`."""
        return tuple(head.cache_spec(layout, window) for head in self.heads)

    def costs(self) -> LayerCosts:
        """See :mod:`maxlm.models.costs`: as many times those of one head."""
        head = self.heads[0].costs()
        matrices: list[MatrixGroup] = []
        for name in self.head_names:
            matrices += prefix_names(name, head.matrices)
        of_all_heads = {
            field.name: len(self.head_names) * getattr(head, field.name)
            for field in fields(LayerCosts)
            if field.name.endswith(("_flops", "_elements"))
        }
        return replace(head, matrices=tuple(matrices), **of_all_heads)
