"""Configs of transformers: what decoders, encoders and both together have in common."""

from math import isclose
from typing import Any, Self

from jax.typing import DTypeLike
from pydantic import model_validator

from maxlm.models.architectures.checks import check_settings
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.architectures.runs import TrunkSpec
from maxlm.models.architectures.settings import TransformerSettings
from maxlm.models.architectures.shrink import PartShrinker
from maxlm.models.layers.rope import YarnScaling, compute_yarn_mscale
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class TransformerConfig(TransformerSettings):
    """Layers between an embedding and an output head."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        check_settings(self)
        return self

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> Any:
        """Builds the model; arguments as those of ``Transformer``."""
        raise NotImplementedError

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """All layers, in the order in which they are run."""
        return (TrunkSpec((*self.layer_runs, *self.mtp_runs)),)

    def score_scale(self, kind: LayerKind) -> float:
        """Returns the factor on q·k in layers of a kind; see ``YarnScaling.mscale``."""
        attention = self.get_attention(kind)
        if attention is None:
            return 1.0
        scale = attention.scale or attention.head_dim**-0.5
        scaling = self.get_positions(kind).scaling
        if not attention.latent or not isinstance(scaling, YarnScaling):
            return scale
        if scaling.mscale_all_dim:
            scale *= compute_yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale

    @property
    def position_limit(self) -> int | None:
        """Positions the model can run at; None: any, if not equally well past
        ``max_seq_len``."""
        return self.max_seq_len if self.positions.kind == "learned" else None

    @property
    def active_expert_fraction(self) -> float:
        """The share of a layer's routed experts that a token meets; 1 without
        experts."""
        if self.moe is None:
            return 1.0
        return self.moe.experts_per_token / self.moe.num_experts

    def shrunk(
        self, *, vocab_size: int, num_layers: int, head_dim: int, seq_len: int
    ) -> Self:
        """Returns a small model of the same structure: the ratio of query to kv heads
        stays (up to 8), so do that of the FFN to the width, the kinds of layers (each
        once), ties, biases, norms, positions, gating and remat; experts are 8 at most,
        registered mixers and feed-forwards as they are; ``vocab_size`` and
        ``num_layers`` are upper bounds."""
        attention_configs = self.list_attention()
        d_model = 2 * head_dim
        old_head_dim = head_dim
        is_latent = False
        if attention_configs:
            attention = self.attention or attention_configs[0]
            old_head_dim = attention.head_dim
            is_latent = attention.latent is not None
            d_model = attention.shrunk(head_dim, seq_len).num_heads * head_dim
        shrinker = PartShrinker(
            head_dim,
            seq_len,
            d_model,
            old_head_dim=old_head_dim,
            old_d_model=self.d_model,
            is_latent=is_latent,
        )
        # Each kind once, so that a model of few layers has them all.
        pattern = tuple(
            entry if isinstance(entry, str) else shrinker.shrink_kind(entry)
            for entry in dict.fromkeys(self.pattern)
        )
        kinds = {name: shrinker.shrink_kind(kind) for name, kind in self.kinds.items()}
        mtp = self.mtp
        if mtp is not None and isinstance(mtp.layer, LayerKind):
            layer = shrinker.shrink_kind(mtp.layer)
            mtp = mtp.model_copy(update={"layer": layer})
        # T5's, without which a narrow model's logits would hardly differ.
        scales_by_width = isclose(self.logit_scale, self.d_model**-0.5, rel_tol=1e-3)
        moe = None if self.moe is None else self.moe.limit_experts(8)
        vocab_size = min(self.vocab_size, vocab_size)
        frontend = self.frontend
        return self.model_copy(
            update={
                "vocab_size": vocab_size,
                "frontend": None if frontend is None else frontend.shrunk(vocab_size),
                "num_layers": min(self.num_layers, num_layers),
                "d_model": d_model,
                "max_seq_len": seq_len,
                "attention": shrinker.shrink_attention(self.attention),
                "mixer": shrinker.shrink_mixer(self.mixer),
                "mlp": shrinker.shrink_ffn(self.mlp),
                "moe": shrinker.shrink_ffn(moe),
                "dense_layers": min(self.dense_layers, 1),
                "kinds": kinds,
                "pattern": pattern,
                "mtp": mtp,
                "layer_inputs": shrinker.shrink_layer_inputs(
                    self.layer_inputs, vocab_size
                ),
                "positions": shrinker.shrink_positions(self.positions),
                "logit_scale": d_model**-0.5 if scales_by_width else self.logit_scale,
            }
        )
