"""Whole models.

An architecture is a config that builds itself. Whatever else maxlm asks of one, it asks its
config: ``build``, ``position_limit``, ``attention_flops``, ``cache_shape``, ``shrunk``. To add one,
write its config and module in a file here and join them to the two names below; pydantic tells
configs apart by their ``architecture``.
"""

from maxlm.models.architectures.decoder import Decoder, DecoderConfig

ModelConfig = DecoderConfig
Model = Decoder

__all__ = ["Decoder", "DecoderConfig", "Model", "ModelConfig"]
