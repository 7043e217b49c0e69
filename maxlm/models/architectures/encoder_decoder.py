"""Encoder and decoder: the one reads the input, the other writes the output and looks
back at what the first made of it (T5, BART)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.models.architectures.config import LayerCount, TransformerConfig, TrunkSpec
from maxlm.models.architectures.transformer import CrossAttentionCache, Transformer
from maxlm.models.architectures.trunk import Trunk
from maxlm.models.aux import Aux
from maxlm.models.caches import CacheArraySpec, CacheLayout
from maxlm.models.layers.attention import EncoderOutput, KeysValues
from maxlm.models.params import bind, get_values, take_stacked_layer

Tokens = tuple[jax.Array, jax.Array, jax.Array | None]
"""Token ids, positions and segment ids, int [B, S]."""


class EncoderDecoderConfig(TransformerConfig):
    """Two trunks alike but for their depth; ``num_layers`` is the decoder's."""

    architecture: Literal["encoder_decoder"] = "encoder_decoder"
    transformer_type = "encoder_decoder"
    encoder_layers: LayerCount
    """Layers of the encoder."""
    start_id: int = Field(default=0, ge=0)
    """The token that the decoder reads first; T5's is its padding."""

    @model_validator(mode="after")
    def _plain(self):
        if (
            self.pattern
            or any(kind.window for kind in self.layer_kinds)
            or self.dense_layers
        ):
            what = "an encoder and a decoder with windows, a pattern or dense_layers"
            raise MaxlmError(
                what, fix="leave them out; such layers are for decoders alone"
            )
        if self.placement not in ("pre", "post"):
            what = f"placement={self.placement} with cross-attention"
            raise MaxlmError(what, fix="use pre or post")
        if self.attention is None:
            raise MaxlmError(
                "cross-attention without attention", fix="give attention, not mixer"
            )
        if self.attention.latent is not None:
            fix = "leave it out, or use a decoder alone"
            raise MaxlmError("cross-attention with attention.latent", fix=fix)
        return self

    @property
    def encoder_config(self) -> TransformerConfig:
        """Config of the encoder by itself."""
        return self.model_copy(update={"num_layers": self.encoder_layers})

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """See :attr:`TransformerConfig.trunks`."""
        stacks = self.encoder_config.layer_stacks
        encoder = TrunkSpec(stacks, "encoder.", causal=False, is_encoder=True)
        return encoder, TrunkSpec(self.layer_stacks, cross_attention=True)

    def build(self, **kwargs: Any) -> "EncoderDecoder":
        """Builds the model; ``kwargs``: arguments of :class:`Transformer`."""
        return EncoderDecoder(self, **kwargs)

    def shrunk(self, **sizes: int) -> "EncoderDecoderConfig":
        """See :meth:`TransformerConfig.shrunk`."""
        layers = min(self.encoder_layers, sizes["num_layers"])
        return super().shrunk(**sizes).model_copy(update={"encoder_layers": layers})


class EncoderDecoder(Transformer):
    """The decoder with its table and head, and an encoder that shares the table."""

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, **kwargs: Any):
        super().__init__(config, cross_attention=True, **kwargs)
        self.encoder = Trunk(config.encoder_config, causal=False, **kwargs)

    @property
    def trunks(self) -> dict[str, Trunk]:
        """See :attr:`Transformer.trunks`."""
        return {"encoder.": self.encoder, "": self}

    def list_embedding_tables(self) -> dict[str, tuple[str, ...]]:
        """See :meth:`Transformer.list_embedding_tables`; both trunks share the table of
        tokens."""
        return super().list_embedding_tables() | {"embedding.table": ("", "encoder.")}

    def encode(self, inputs: Tokens) -> tuple[EncoderOutput, Aux]:
        """Runs the encoder over the input."""
        tokens, positions, segment_ids = inputs
        x = self.encoder.embed_inputs(self.embedding(tokens), positions)
        x, aux = self.encoder.run_layers(x, (positions, segment_ids))
        return EncoderOutput(self.encoder.apply_final_norm(x), segment_ids), aux

    def project_cross_keys(self, inputs: Tokens) -> dict[str, tuple[KeysValues, ...]]:
        """Makes, for inference, the keys and values of the input for each layer, by
        stack."""
        encoded, _ = self.encode(inputs)

        def project(stack: Any) -> tuple[KeysValues, ...]:
            own = get_values(stack)
            count = self.config.num_layers
            layers = (
                bind(stack, take_stacked_layer(own, layer)) for layer in range(count)
            )
            return tuple(
                layer.cross.project_keys_values(encoded.states) for layer in layers
            )

        return {name: project(stack) for name, stack in self.stacks.items()}

    def cross_cache_specs(
        self, layout: CacheLayout, length: int
    ) -> CrossAttentionCache:
        """Returns the cross-attention cache of inputs of ``length`` tokens, with a
        :class:`~maxlm.models.caches.CacheArraySpec` for each array."""
        attention = self.config.attention
        lead = (layout.num_shards, layout.num_rows, length)
        assert attention is not None
        shape = (*lead, attention.num_kv_heads, attention.head_dim)
        keys = CacheArraySpec(shape, ("batch", None, None, "kv_heads", None))
        layers = (KeysValues(keys, keys),) * self.config.num_layers
        segments = CacheArraySpec(lead, ("batch", None, None), jnp.int32)
        return CrossAttentionCache(dict.fromkeys(self.stacks, layers), segments)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        inputs: Tokens,
    ) -> tuple[jax.Array, Aux]:
        """Hidden states of the output's tokens; see :class:`Transformer`. Segments of
        equal number of these and of the encoder's ``inputs`` belong together."""
        memory, aux = self.encode(inputs)
        x, more = self.run_layers(
            self.embed(tokens, positions), (positions, segment_ids), memory
        )
        return self.apply_final_norm(x), aux.plus(more)
