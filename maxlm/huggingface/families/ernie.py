"""ERNIE 4.5's dense models (Baidu ERNIE Team 2025, technical report of ERNIE 4.5):
Llama's shape with neighbouring dimensions turned, and one switch for all biases."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig


def _table(config: TransformerConfig) -> NameTable:
    return {
        **llama.OUTER,
        **llama.NORMS,
        **llama.map_paired_attention(config),
        **llama.MLP,
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    settings["mlp"]["bias"] = settings["attention"]["bias"]


ERNIE4_5 = ModelFamily(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(2),
        **llama.SWIGLU,
        "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        "use_bias": fields.map_flag("attention.bias", False),
    },
    _table,
    rope_kwargs={"theta": 500_000.0},
    read_extra=_read,
)
