"""Qwen2 and 2.5 (Yang et al. 2024, arXiv 2407.10671), Qwen3 and its mixtures of experts
(Qwen Team 2025, arXiv 2505.09388): Llama's shape with biases on queries, keys and
values, later with norms on queries and keys instead."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

EXPERTS = {
    "model.layers.{layer}.mlp.gate.weight": linear("moe.router"),
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": linear("moe.gate"),
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": linear("moe.up"),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": linear("moe.down"),
}


def _read_windows(reader: ConfigReader, settings: dict[str, Any]) -> None:
    """Layers from ``max_window_layers`` on have a window, if there is one."""
    num_layers = settings["num_layers"]
    window = reader.size("sliding_window", 4096, nullable=True)
    used = reader.flag("use_sliding_window", False) and window is not None
    first = reader.size("max_window_layers", 28, least=0)
    num_global = first if used else num_layers
    kinds = [LOCAL if layer >= num_global else GLOBAL for layer in range(num_layers)]
    local = {"window": window if used else None}
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: {}})


def _write_windows(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    first = kinds.index(LOCAL) if LOCAL in kinds else len(kinds)
    return {
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
    }


def _read_window(reader: ConfigReader, settings: dict[str, Any]) -> None:
    window = reader.size("sliding_window", 4096, nullable=True)
    used = reader.flag("use_sliding_window", False)
    settings["attention"]["window"] = window if used else None
    reader.ignore("intermediate_size")  # of dense layers, which there are none of
    reader.ignore("max_window_layers")  # unread by the published code


def _write_window(config: TransformerConfig) -> dict[str, Any]:
    window = config.attention.window
    return {"use_sliding_window": window is not None, "sliding_window": window}


QWEN2 = ModelFamily(
    "qwen2",
    "Qwen2ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(32),
        **llama.SWIGLU,
        "use_mrope": fields.require_value(False),
    },
    llama.TABLE,
    {"attention.bias": True, "attention.out_bias": False},
    rope_kwargs={},
    read_extra=_read_windows,
    write_extra=_write_windows,
)
QWEN3 = ModelFamily(
    "qwen3",
    "Qwen3ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(32),
        **llama.SWIGLU,
        "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
        "attention_bias": fields.map_flag("attention.bias", False),
    },
    llama.TABLE,
    {"attention.qk_norm": True},
    rope_kwargs={},
    read_extra=_read_windows,
    write_extra=_write_windows,
)
QWEN3_MOE = ModelFamily(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(4),
        **llama.EXPERTS,
        "num_experts": fields.map_size("moe.num_experts", alias="num_local_experts"),
        "moe_intermediate_size": fields.map_size("moe.d_ff"),
        "norm_topk_prob": fields.map_flag("moe.renormalise", False),
        "attention_bias": fields.map_flag("attention.bias", False),
        "decoder_sparse_step": fields.require_value(1, always_write=True),
        "mlp_only_layers": fields.require_value([], None, always_write=True),
    },
    {**llama.TABLE, **EXPERTS},
    {"attention.qk_norm": True},
    rope_kwargs={},
    read_extra=_read_window,
    write_extra=_write_window,
)
