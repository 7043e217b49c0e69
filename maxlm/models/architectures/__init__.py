"""Whole models.

An architecture is a config that builds its module. The rest of maxlm asks the config
for ``build``, ``position_limit``, ``shrunk``, ``trunks`` and sizes; the module for a
call, ``trunks``, ``prepare_logits``, ``logits``, ``rules``, ``dtype`` and ``config``;
one that decodes for ``cache_specs`` and ``forward_with_cache`` too. To add one, write
both in a file here and name the config in ``ARCHITECTURES``, or register it from
outside: ``ARCHITECTURES.register("name")`` decorates the config, and an installed
package names it in an entry point of the group ``maxlm.architectures``.
"""

from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.transformer import Transformer

ARCHITECTURES = Registry[type[TransformerConfig]](
    "architecture",
    {
        "decoder": "maxlm.models.architectures.transformer:DecoderConfig",
        "encoder": "maxlm.models.architectures.encoder:EncoderConfig",
        "encoder_decoder": (
            "maxlm.models.architectures.encoder_decoder:EncoderDecoderConfig"
        ),
    },
)
ModelConfig = Annotated[
    TransformerConfig,
    RegisteredConfig(
        ARCHITECTURES, TransformerConfig, tag="architecture", default="decoder"
    ),
]
Model = Transformer

__all__ = ["ARCHITECTURES", "Model", "ModelConfig"]
