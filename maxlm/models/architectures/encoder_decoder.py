"""Encoder and decoder: the one reads the input, the other writes the output and looks
back at what the first made of it (T5, BART)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.runs import TrunkSpec
from maxlm.models.architectures.settings import LayerCount
from maxlm.models.architectures.transformer import CrossAttentionCache, Transformer
from maxlm.models.architectures.trunk import TokenInputs, Trunk
from maxlm.models.aux import Aux
from maxlm.models.blocks import Block
from maxlm.models.caches import CacheArraySpec, CacheLayout
from maxlm.models.caches.layout import as_array
from maxlm.models.layers.attention import EncoderOutput, KeysValues
from maxlm.models.params import bind, get_values, take_stacked_layer
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules

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
        if self.mtp is not None:
            raise MaxlmError(
                "mtp predicts tokens of a decoder alone", fix="set mtp to null"
            )
        has_windows = any(kind.window for kind in self.layer_kinds)
        if self.pattern or has_windows or self.dense_layers:
            raise MaxlmError(
                "an encoder and a decoder with windows, a pattern or dense_layers",
                fix="leave them out; such layers are for decoders alone",
            )
        if self.placement not in ("pre", "post"):
            raise MaxlmError(
                f"placement={self.placement} with cross-attention",
                fix="use pre or post",
            )
        if self.attention is None:
            raise MaxlmError(
                "cross-attention without attention", fix="give attention, not mixer"
            )
        if self.attention.latent is not None:
            raise MaxlmError(
                "cross-attention with attention.latent",
                fix="leave it out, or use a decoder alone",
            )
        return self

    @property
    def encoder_config(self) -> TransformerConfig:
        """Config of the encoder by itself."""
        return self.model_copy(update={"num_layers": self.encoder_layers})

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """See :attr:`TransformerConfig.trunks`."""
        runs = self.encoder_config.layer_runs
        encoder = TrunkSpec(runs, "encoder.", causal=False, is_encoder=True)
        return encoder, TrunkSpec(self.layer_runs, cross_attention=True)

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> "EncoderDecoder":
        """Builds the model; arguments as those of :class:`Transformer`."""
        return EncoderDecoder(self, rules=rules, dtype=dtype, parallel=parallel)

    def shrunk(self, **sizes: int) -> "EncoderDecoderConfig":
        """See :meth:`TransformerConfig.shrunk`."""
        layers = min(self.encoder_layers, sizes["num_layers"])
        return super().shrunk(**sizes).model_copy(update={"encoder_layers": layers})


class EncoderDecoder(Transformer):
    """The decoder with its table and head, and an encoder that shares the table."""

    config: EncoderDecoderConfig

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ):
        super().__init__(
            config, rules=rules, dtype=dtype, parallel=parallel, cross_attention=True
        )
        self.encoder = Trunk(
            config.encoder_config,
            rules=rules,
            dtype=dtype,
            parallel=parallel,
            causal=False,
        )

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
        x, aux = self.encoder.run_layers(x, TokenInputs(positions, segment_ids))
        return EncoderOutput(self.encoder.apply_final_norm(x), segment_ids), aux

    def project_cross_keys(self, inputs: Tokens) -> dict[str, tuple[KeysValues, ...]]:
        """Makes, for inference, the keys and values of the input for each layer, by
        stack."""
        encoded, _ = self.encode(inputs)

        def project_stack(stack: Block) -> tuple[KeysValues, ...]:
            params = get_values(stack)
            keys_values = []
            for layer in range(self.config.num_layers):
                block = bind(stack, take_stacked_layer(params, layer))
                assert block.cross is not None
                keys_values.append(block.cross.project_keys_values(encoded.states))
            return tuple(keys_values)

        return {name: project_stack(stack) for name, stack in self.stacks.items()}

    def cross_cache_specs(
        self, layout: CacheLayout, length: int
    ) -> CrossAttentionCache:
        """Returns the cross-attention cache of inputs of ``length`` tokens, with a
        :class:`~maxlm.models.caches.CacheArraySpec` for each array."""
        attention = self.config.attention
        assert attention is not None
        num_layers = self.config.num_layers
        rows = (layout.num_shards, layout.num_rows, length)
        key = as_array(
            CacheArraySpec(
                (*rows, attention.num_kv_heads, attention.head_dim),
                ("batch", None, None, "kv_heads", None),
            )
        )
        segment_ids = as_array(CacheArraySpec(rows, ("batch", None, None), jnp.int32))
        layers = (KeysValues(key, key),) * num_layers
        keys_values = dict.fromkeys(self.stacks, layers)
        return CrossAttentionCache(keys_values, segment_ids)

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
        encoder_output, encoder_aux = self.encode(inputs)
        x = self.embed(tokens, positions)
        x, aux = self.run_layers(x, TokenInputs(positions, segment_ids), encoder_output)
        return self.apply_final_norm(x), encoder_aux.plus(aux)
