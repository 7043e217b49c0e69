"""Parts of small models with the structure of large ones, for smoke tests."""

from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, runtime_checkable

from maxlm.config import Config
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.layer_inputs import LayerInputsConfig
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import resize_scaling

FfnT = TypeVar("FfnT", MlpConfig, MoeConfig)
MixerT = TypeVar("MixerT")


@runtime_checkable
class ShrinkableConfig(Protocol):
    """A mixer's config that can be made small."""

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns the same kind with heads of ``head_dim``, for sequences of
        ``seq_len``."""
        ...


@dataclass(frozen=True)
class PartShrinker:
    """Makes the configs of a model's parts small."""

    head_dim: int
    seq_len: int
    d_model: int
    """Width of the small model."""
    old_head_dim: int
    old_d_model: int
    is_latent: bool = False
    """Whether the model's attention is latent, whose small heads turn by half."""

    def shrink_ffn(self, ffn: FfnT | None) -> FfnT | None:
        """Returns a feed-forward of the same ratio to the width, in multiples of 8."""
        if ffn is None:
            return None
        widths = {"d_ff": ffn.d_ff}
        if isinstance(ffn, MoeConfig):
            others = {"shared_d_ff": ffn.shared_d_ff, "latent_dim": ffn.latent_dim}
            widths |= {name: width for name, width in others.items() if width}
        changes = {name: self._shrink_width(width) for name, width in widths.items()}
        return ffn.model_copy(update=changes)

    def _shrink_width(self, width: int) -> int:
        ratio = width / self.old_d_model
        return max(1, round(ratio * self.d_model / 8)) * 8

    def shrink_layer_inputs(
        self, inputs: LayerInputsConfig | None, vocab_size: int
    ) -> LayerInputsConfig | None:
        """Returns inputs of layers of the same ratio to the width, from a table of at
        most ``vocab_size`` rows."""
        if inputs is None:
            return None
        num_rows = inputs.vocab_size
        if num_rows is not None:
            num_rows = min(num_rows, vocab_size)
        width = self._shrink_width(inputs.width)
        return inputs.model_copy(update={"width": width, "vocab_size": num_rows})

    def shrink_positions(
        self, positions: PositionsConfig | None
    ) -> PositionsConfig | None:
        """Returns positions that turn the same share of a head."""
        if positions is None:
            return positions
        rotary_dim = positions.rotary_dim
        turning_dims = self.head_dim // 2 if self.is_latent else self.head_dim
        if rotary_dim is not None:
            share = rotary_dim / self.old_head_dim
            rotary_dim = max(2, round(share * self.head_dim / 2) * 2)
            turning_dims = rotary_dim
        scaling = resize_scaling(positions.scaling, turning_dims)
        changes = {"rotary_dim": rotary_dim, "scaling": scaling}
        return positions.model_copy(update=changes)

    def shrink_attention(
        self, attention: AttentionConfig | None
    ) -> AttentionConfig | None:
        """Returns attention with small heads."""
        if attention is None:
            return None
        return attention.shrunk(self.head_dim, self.seq_len)

    def shrink_mixer(self, mixer: MixerT) -> MixerT:
        """Returns a mixer that can be made small so, others as they are."""
        if isinstance(mixer, ShrinkableConfig) and isinstance(mixer, Config):
            return mixer.shrunk(self.head_dim, self.seq_len)
        return mixer

    def shrink_kind(self, kind: LayerKind) -> LayerKind:
        """Returns a kind of layers with all its parts small."""
        window = None if kind.window is None else max(2, self.seq_len // 4)
        changes = {
            "window": window,
            "positions": self.shrink_positions(kind.positions),
            "attention": self.shrink_attention(kind.attention),
            "mixer": self.shrink_mixer(kind.mixer),
            "mlp": self.shrink_ffn(kind.mlp),
        }
        return kind.model_copy(update=changes)
