"""Ministral 8B (Mistral AI 2024): Mistral's shape, with windows by a list of layers'
kinds. Ministral 3 (Mistral AI 2025): Mistral's shape with YaRN, and queries that grow
with their positions."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import read_position_settings, write_scaling
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


_TEMPERATURE = "llama_4_scaling_beta"
_USUAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _TEMPERATURE: 0.1,
}
"""Positions of a file that says nothing of them."""


def _read_3(reader: ConfigReader, settings: dict[str, Any]) -> None:
    key = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
    if not reader.has(key):
        key = "rope_parameters"
        reader.values[key] = _USUAL_ROPE
    attention = settings["attention"]
    settings["positions"] = read_position_settings(
        reader, attention["head_dim"], theta=1_000_000.0
    )
    rope = reader.read_nested(key)
    rope.ignore("max_position_embeddings")  # which the file says outside, too
    attention["temperature"] = {
        "scale": rope.number(_TEMPERATURE),
        "length": rope.size("original_max_position_embeddings"),
        # The first token of a sequence is 0.
        "offset": 0,
    }


def _write_3(config: TransformerConfig) -> dict[str, Any]:
    positions = config.positions
    scaling = write_scaling(positions) or {"rope_type": "default"}
    temperature = config.attention.temperature
    values = {
        "rope_theta": positions.theta,
        **scaling,
        _TEMPERATURE: temperature.scale,
        "original_max_position_embeddings": temperature.length,
    }
    return {"rope_parameters": values}


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
MINISTRAL3 = ModelFamily(
    "ministral3",
    "Ministral3ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "sliding_window": fields.map_size("attention.window", None),
    },
    llama.TABLE,
    {"attention.temperature.offset": 0},
    read_extra=_read_3,
    write_extra=_write_3,
)
