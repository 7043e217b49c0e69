"""Decoder-only language models: GPT-2, Llama and their like, by configuration."""

from typing import Any, Literal

from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.transformer import Transformer
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class DecoderConfig(TransformerConfig):
    """A causal decoder; see configs/models for published sizes."""

    architecture: Literal["decoder"] = "decoder"

    def build(
        self, *, rules: AxisRules, dtype: Any, parallel: ParallelConfig = ParallelConfig()
    ) -> "Decoder":
        """The model; see :class:`Decoder`."""
        return Decoder(self, rules=rules, dtype=dtype, parallel=parallel)


class Decoder(Transformer):
    """A transformer that continues its input."""

    config: DecoderConfig
