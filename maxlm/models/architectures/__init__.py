"""Whole models.

An architecture is a config that builds its module. The rest of maxlm asks the config
for ``build``, ``position_limit``, ``shrunk``, ``trunks`` and sizes; the module for a
call, ``trunks``, ``prepare_logits``, ``logits``, ``rules``, ``dtype`` and ``config``;
one that decodes for ``cache_specs`` and ``forward_with_cache`` too. To add one, write
both in a file here and join them to the two names below; pydantic tells configs apart
by their ``architecture``.
"""

from typing import Annotated

from pydantic import Field

from maxlm.config import add_default_tag
from maxlm.models.architectures.encoder import Encoder, EncoderConfig
from maxlm.models.architectures.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
)
from maxlm.models.architectures.transformer import Decoder, DecoderConfig

ModelConfig = Annotated[
    DecoderConfig | EncoderConfig | EncoderDecoderConfig,
    Field(discriminator="architecture"),
    add_default_tag("architecture", "decoder"),
]
Model = Decoder | Encoder | EncoderDecoder
GenerativeModel = Decoder | EncoderDecoder
"""A model that continues text."""
