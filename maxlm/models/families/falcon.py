"""Falcon 7B and 40B (Almazrouei et al. 2023, arXiv 2311.16867): attention and FFN side by side, few
kv heads. The 1B models with ALiBi scale and round their slopes in a way of their own: refused."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear, map_linear, map_norm, split_grouped_qkv
from maxlm.models.families.gpt2 import QKV, read_activation, to_hf_activation
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader
from maxlm.models.families.rope import read_positions, write_positions

H = "transformer.h.{layer}"
TABLE: NameTable = {
    "transformer.word_embeddings.weight": copy("embedding.table", "lm_head.weight"),
    f"{H}.self_attention.query_key_value.weight": split_grouped_qkv(*(f"{x}.kernel" for x in QKV)),
    f"{H}.self_attention.query_key_value.bias": split_grouped_qkv(*(f"{x}.bias" for x in QKV)),
    **map_linear(f"{H}.self_attention.dense", "attention.out"),
    **map_linear(f"{H}.mlp.dense_h_to_4h", "mlp.up"),
    **map_linear(f"{H}.mlp.dense_4h_to_h", "mlp.down"),
    **map_norm("transformer.ln_f", "final_norm"),
}
UNTIED: NameTable = {
    "transformer.word_embeddings.weight": copy("embedding.table"),
    "lm_head.weight": linear("head.kernel"),
}


def _table(config: DecoderConfig) -> NameTable:
    two = config.placement == "parallel"
    attention, mlp = (
        ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    )
    norms: NameTable = {
        **map_norm(f"{H}.{attention}", "attention_norm"),
        **map_norm(f"{H}.{mlp}", "mlp_norm"),
    }
    return {**TABLE, **norms, **({} if config.tie_embeddings else UNTIED)}


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    new = reader.flag("new_decoder_architecture", False)
    parallel = reader.flag("parallel_attn", True)
    many = reader.size("num_kv_heads", None) or heads
    single = reader.flag("multi_query", True)
    kv_heads = many if new else 1 if single else heads
    norms = reader.size("num_ln_in_parallel_attn", None) or (2 if new else 1)
    placement = "pre"
    if new or parallel:
        placement = "parallel" if new and norms == 2 else "parallel_shared"
    reader.require("alibi", False)
    reader.require("apply_residual_connection_post_layernorm", False)
    d_ff = reader.size("ffn_hidden_size", None) or 4 * width
    reader.require("ff_factor", d_ff / width)
    bias, eps = reader.flag("bias", False), reader.number("layer_norm_epsilon", 1e-5)
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_position_embeddings", 2048),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": width // heads,
            "bias": bias,
        },
        "mlp": {
            "d_ff": d_ff,
            "activation": read_activation(reader, "activation", "gelu"),
            "gated": False,
            "bias": bias,
        },
        "norm": {"kind": "layernorm", "eps": eps, "bias": True},
        "placement": placement,
        "positions": read_positions(reader, width // heads),
        "tie_embeddings": reader.flag("tie_word_embeddings", True),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention = config.attention
    assert config.mlp is not None
    new = config.placement == "parallel" or 1 < attention.num_kv_heads < attention.num_heads
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "new_decoder_architecture": new,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": config.placement != "pre",
        "num_ln_in_parallel_attn": 2 if config.placement == "parallel" else 1,
        "bias": attention.bias,
        "alibi": False,
        "ffn_hidden_size": config.mlp.d_ff,
        "activation": to_hf_activation(config.mlp.activation),
        "layer_norm_epsilon": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **write_positions(config.positions, attention.head_dim),
    }


FALCON = ModelFamily("falcon", "falcon", "FalconForCausalLM", _read, _write, _table)
