"""Decoder-only language models: GPT-2, Llama and their like, by configuration."""

from typing import Any, Literal

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.transformer import Transformer


class DecoderConfig(TransformerConfig):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"

    def build(self, **how: Any) -> "Decoder":
        """Builds the model; ``how`` as of :class:`Transformer`."""
        return Decoder(self, **how)


class Decoder(Transformer):
    """A transformer that continues its input."""

    config: DecoderConfig
