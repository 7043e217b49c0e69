"""Ministral 8B (Mistral AI 2024): Mistral's shape, with windows by a list of layers'
kinds."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    window = reader.size("sliding_window", 4096, nullable=True)
    kinds = [GLOBAL if window is None else LOCAL] * settings["num_layers"]
    settings |= fields.read_layer_pattern(
        reader, kinds, {LOCAL: {"window": window}, GLOBAL: {}}
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    return {"layer_types": kinds, "sliding_window": window}


MINISTRAL = ModelFamily(
    "ministral",
    "MinistralForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
    },
    llama.TABLE,
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
)
