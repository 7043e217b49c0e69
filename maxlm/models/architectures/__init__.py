"""Whole models.

An architecture is a config that builds its module. The rest of maxlm asks the config for
``build``, ``position_limit``, ``attention_flops``, ``cache_shape``, ``shrunk`` and the sizes
``vocab_size``, ``d_model`` and ``max_seq_len``; the module for a call as the decoder's,
``unembedding``, ``logits``, ``rules``, ``dtype`` and ``config``. To add one that decodes, write
both in a file here and join them to the two names below; pydantic tells configs apart by their
``architecture``.
"""

from maxlm.models.architectures.decoder import Decoder, DecoderConfig

ModelConfig = DecoderConfig
Model = Decoder

__all__ = ["Decoder", "DecoderConfig", "Model", "ModelConfig"]
