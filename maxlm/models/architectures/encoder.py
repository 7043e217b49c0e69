"""Encoders: every token sees every other one of its segment (BERT)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from pydantic import Field, model_validator

from maxlm.config import MaxlmError
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.runs import TrunkSpec
from maxlm.models.architectures.transformer import Transformer
from maxlm.models.aux import Aux
from maxlm.models.layers.linear import Embedding, Linear
from maxlm.models.layers.mlp import ACTIVATIONS, Activation
from maxlm.models.layers.norm import Norm
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class EncoderConfig(TransformerConfig):
    """A bidirectional encoder with a head that names masked tokens."""

    architecture: Literal["encoder"] = "encoder"
    transformer_type = "encoder"
    token_types: int = Field(default=0, ge=0)
    """Rows of a table that tells apart the texts of a pair; 0: there is none."""
    head_activation: Activation | None = None
    """Activation of a layer of the head before the logits, with a norm after it; null:
    no layer."""

    @model_validator(mode="after")
    def _sees_both_ways(self):
        if self.mtp is not None:
            raise MaxlmError(
                "mtp predicts tokens of a decoder alone", fix="set mtp to null"
            )
        if any(kind.window is not None for kind in self.layer_kinds):
            raise MaxlmError(
                "windows look back; an encoder sees both ways", fix="set it to null"
            )
        return self

    @property
    def trunks(self) -> tuple[TrunkSpec, ...]:
        """See :attr:`TransformerConfig.trunks`."""
        return (TrunkSpec(self.layer_runs, causal=False),)

    def build(
        self,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ) -> "Encoder":
        """Builds the model; arguments as those of :class:`Transformer`."""
        return Encoder(self, rules=rules, dtype=dtype, parallel=parallel)


class Encoder(Transformer):
    """Maps tokens to hidden states of all of them."""

    config: EncoderConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rules: AxisRules,
        dtype: DTypeLike,
        parallel: ParallelConfig = ParallelConfig(),
    ):
        super().__init__(
            config, rules=rules, dtype=dtype, parallel=parallel, causal=False
        )
        self.types = (
            Embedding(None, config.token_types, self.context)
            if config.token_types
            else None
        )
        self.head_layer = (
            self._build_head_layer() if config.head_activation is not None else None
        )

    def _build_head_layer(self) -> nnx.Dict:
        width = self.config.d_model
        dense = Linear({"embed": width}, {"latent": width}, self.context, bias=True)
        norm = Norm(self.config.norm, width, self.context)
        return nnx.Dict(dense=dense, norm=norm)

    def list_embedding_tables(self) -> dict[str, tuple[str, ...]]:
        """See :meth:`Transformer.list_embedding_tables`."""
        tables = super().list_embedding_tables()
        if self.types is not None:
            tables["types.table"] = ("",)
        return tables

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Computes hidden states as the head wants them; see :class:`Transformer`.
        ``types``: the text of a pair that each token is of, int; None: the first."""
        x, aux = self.forward_without_head(tokens, positions, segment_ids, types)
        head = self.head_layer
        if head is not None and self.config.head_activation is not None:
            activate = ACTIVATIONS[self.config.head_activation]
            x = activate(head.dense(x, seq_axis="residual"))
            x = head.norm(x)
        return x, aux

    def forward_without_head(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Computes the last layer's hidden states [B, S, D], which embeddings are
        pooled from."""
        x = self.embedding(tokens)
        if self.types is not None:
            if types is None:
                types = jnp.zeros_like(tokens)
            x += self.types(types)
        x = self.embed_inputs(x, positions)
        return self.forward_embedded(x, positions, segment_ids)
