"""Qwen2 and 2.5 (Yang et al. 2024, arXiv 2407.10671), Qwen3 and its mixtures of experts (Qwen Team
2025, arXiv 2505.09388): Llama's shape with biases on queries, keys and values, later with norms on
queries and keys instead."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import linear
from maxlm.models.families.layers import GLOBAL, LOCAL, read_pattern, write_pattern
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

EXPERTS: NameTable = {
    "model.layers.{layer}.mlp.gate.weight": linear("moe.router"),
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": linear("moe.gate"),
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": linear("moe.up"),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": linear("moe.down"),
}
TABLE: NameTable = {**llama.TABLE, **EXPERTS}


def _windows(reader: ConfigReader, settings: dict[str, Any]) -> None:
    """Layers from ``max_window_layers`` on have a window, if there is one."""
    layers, window = settings["num_layers"], reader.size("sliding_window", 4096, nullable=True)
    used = reader.flag("use_sliding_window", False) and window is not None
    first = reader.size("max_window_layers", 28, least=0)
    kinds = [LOCAL if used and layer >= first else GLOBAL for layer in range(layers)]
    settings |= read_pattern(
        reader, kinds, {LOCAL: {"window": window if used else None}, GLOBAL: {}}
    )


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    kinds, window = write_pattern(config)
    return {
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, kind in enumerate(kinds) if kind == LOCAL), len(kinds)),
    }


def _read_qwen2(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader, kv_heads=32)
    settings["attention"] |= {"bias": True, "out_bias": False}
    reader.require("use_mrope", False)
    _windows(reader, settings)
    return settings | {"mlp": llama.read_swiglu(reader)}


def _read_qwen3(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader, kv_heads=32, head_dim=128)
    settings["attention"] |= {"bias": reader.flag("attention_bias", False), "qk_norm": True}
    _windows(reader, settings)
    return settings | {"mlp": llama.read_swiglu(reader)}


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **llama.write_common(config),
        **_write_windows(config),
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": config.mlp.activation,
    }


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write(config), "attention_bias": config.attention.bias}


def _read_moe(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader, kv_heads=4)
    window = reader.size("sliding_window", 4096, nullable=True)
    settings["attention"] |= {
        "bias": reader.flag("attention_bias", False),
        "qk_norm": True,
        "window": window if reader.flag("use_sliding_window", False) else None,
    }
    reader.require("decoder_sparse_step", 1)
    reader.require("mlp_only_layers", [], None)
    reader.get("intermediate_size", None)  # of dense layers, which there are none of
    reader.get("max_window_layers", None)  # unread by the published code
    k = reader.size("num_experts_per_tok")
    settings["moe"] = {
        "num_experts": reader.size("num_experts", also="num_local_experts"),
        "experts_per_token": k,
        **llama.read_swiglu(reader, "moe_intermediate_size"),
        "renormalise": reader.flag("norm_topk_prob", False),
        # Its shares of assignments sum to k, ours to 1.
        "balance_loss": reader.number("router_aux_loss_coef", 0.001, least=0) * k,
    }
    return settings


def _write_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, attention = config.moe, config.attention
    assert moe is not None
    return {
        **llama.write_common(config),
        "attention_bias": attention.bias,
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_ff,
        "hidden_act": moe.activation,
        "norm_topk_prob": moe.renormalise,
        "router_aux_loss_coef": moe.balance_loss / moe.experts_per_token,
    }


_table = llama.tie_embeddings(TABLE)
QWEN2 = ModelFamily("qwen2", "qwen2", "Qwen2ForCausalLM", _read_qwen2, _write, _table)
QWEN3 = ModelFamily("qwen3", "qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, _table)
QWEN3_MOE = ModelFamily(
    "qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", _read_moe, _write_moe, _table
)
