"""Falcon 7B and 40B (Almazrouei et al. 2023, arXiv 2311.16867): attention and FFN side by side, few
kv heads. The 1B models with ALiBi scale and round their slopes in a way of their own: refused."""

from typing import Any

from maxlm.models.families import bloom, fields
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.names import NameTable, linear, map_norm
from maxlm.models.families.reader import ConfigReader


def _table(config: Any) -> NameTable:
    attention, mlp = "input_layernorm", "post_attention_layernorm"
    if config.placement == "parallel":
        attention, mlp = "ln_attn", "ln_mlp"
    return {
        **bloom.COMMON,
        **map_norm(f"{bloom.H}.{attention}", "attention_norm"),
        **map_norm(f"{bloom.H}.{mlp}", "mlp_norm"),
        "lm_head.weight": linear("head.kernel"),
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention, mlp = settings["attention"], settings["mlp"]
    new = reader.flag("new_decoder_architecture", False)
    parallel = reader.flag("parallel_attn", True)
    many = reader.size("num_kv_heads", None) or attention["num_heads"]
    single = reader.flag("multi_query", True)
    attention["num_kv_heads"] = many if new else 1 if single else attention["num_heads"]
    norms = reader.size("num_ln_in_parallel_attn", None) or (2 if new else 1)
    if new or parallel:
        settings["placement"] = "parallel" if new and norms == 2 else "parallel_shared"
    reader.read_implemented("ff_factor", mlp["d_ff"] / settings["d_model"])
    mlp["bias"] = attention["bias"]


def _write(config: Any) -> dict[str, Any]:
    attention, two_norms = config.attention, config.placement == "parallel"
    return {
        "num_kv_heads": attention.num_kv_heads,
        "new_decoder_architecture": two_norms or 1 < attention.num_kv_heads < attention.num_heads,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": config.placement != "pre",
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
    }


FALCON = ModelFamily(
    "falcon",
    "FalconForCausalLM",
    {
        **fields.SIZES,
        "max_position_embeddings": fields.map_size("max_seq_len", 2048),
        "bias": fields.map_flag("attention.bias", False),
        "ffn_hidden_size": fields.map_size("mlp.d_ff", None),
        "activation": fields.map_activation("mlp.activation", "gelu"),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        "alibi": fields.require_value(False, always_write=True),
        "apply_residual_connection_post_layernorm": fields.require_value(False),
    },
    _table,
    {"mlp.gated": False, "norm.kind": "layernorm", "norm.bias": True},
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
)
