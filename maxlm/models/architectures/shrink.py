"""Small models of the structure of large ones, for smoke tests."""

from math import isclose
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from maxlm.config import Config
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.mlp import MlpConfig
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.positions import PositionsConfig

FfnT = TypeVar("FfnT", MlpConfig, MoeConfig)
MixerT = TypeVar("MixerT")


class SmallSizes(NamedTuple):
    """Sizes of a small model; those of the vocabulary and layers are upper bounds."""

    vocab_size: int
    num_layers: int
    head_dim: int
    seq_len: int


@runtime_checkable
class ShrinkableConfig(Protocol):
    """A mixer's config that can be made small."""

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns the same kind with heads of ``head_dim``, for sequences of
        ``seq_len``."""
        ...


def shrink_settings(config: TransformerConfig, sizes: SmallSizes) -> dict[str, Any]:
    """Returns the settings that make a config small; see
    :meth:`TransformerConfig.shrunk`."""
    head_dim = sizes.head_dim
    attention_configs = config.list_attention()
    d_model = 2 * head_dim
    old_head_dim = head_dim
    if attention_configs:
        attention = config.attention or attention_configs[0]
        old_head_dim = attention.head_dim
        d_model = attention.shrunk(head_dim, sizes.seq_len).num_heads * head_dim

    def shrink_ffn(ffn: FfnT | None) -> FfnT | None:
        if ffn is None:
            return None
        # The same ratio to d_model, in multiples of 8.
        d_ff = max(1, round(ffn.d_ff / config.d_model * d_model / 8)) * 8
        return ffn.model_copy(update={"d_ff": d_ff})

    def shrink_positions(positions: PositionsConfig | None) -> PositionsConfig | None:
        if positions is None or positions.rotary_dim is None:
            return positions
        share = positions.rotary_dim / old_head_dim
        rotary_dim = max(2, round(share * head_dim / 2) * 2)
        return positions.model_copy(update={"rotary_dim": rotary_dim})

    def shrink_attention(attention: AttentionConfig | None) -> AttentionConfig | None:
        if attention is None:
            return None
        return attention.shrunk(head_dim, sizes.seq_len)

    def shrink_mixer(mixer: Config | str | None) -> Config | str | None:
        if isinstance(mixer, ShrinkableConfig):
            return mixer.shrunk(head_dim, sizes.seq_len)
        return mixer

    def shrink_kind(kind: LayerKind) -> LayerKind:
        window = None if kind.window is None else max(2, sizes.seq_len // 4)
        changes = {
            "window": window,
            "positions": shrink_positions(kind.positions),
            "attention": shrink_attention(kind.attention),
            "mixer": shrink_mixer(kind.mixer),
            "mlp": shrink_ffn(kind.mlp),
        }
        return kind.model_copy(update=changes)

    # Each kind once, so that a model of few layers has them all.
    pattern = tuple(
        entry if isinstance(entry, str) else shrink_kind(entry)
        for entry in dict.fromkeys(config.pattern)
    )
    # T5's, without which a narrow model's logits would hardly differ.
    scales_by_width = isclose(config.logit_scale, config.d_model**-0.5, rel_tol=1e-3)
    moe = None if config.moe is None else config.moe.limit_experts(8)
    vocab_size = min(config.vocab_size, sizes.vocab_size)
    frontend = config.frontend
    return {
        "vocab_size": vocab_size,
        "frontend": None if frontend is None else frontend.shrunk(vocab_size),
        "num_layers": min(config.num_layers, sizes.num_layers),
        "d_model": d_model,
        "max_seq_len": sizes.seq_len,
        "attention": shrink_attention(config.attention),
        "mixer": shrink_mixer(config.mixer),
        "mlp": shrink_ffn(config.mlp),
        "moe": shrink_ffn(moe),
        "dense_layers": min(config.dense_layers, 1),
        "kinds": {name: shrink_kind(kind) for name, kind in config.kinds.items()},
        "pattern": pattern,
        "positions": shrink_positions(config.positions),
        "logit_scale": d_model**-0.5 if scales_by_width else config.logit_scale,
    }
