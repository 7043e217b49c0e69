"""Llama 1 to 3.3 (Touvron et al. 2023, arXiv 2302.13971; Llama Team 2024, arXiv 2407.21783),
SmolLM2, and Mistral (Jiang et al. 2023, arXiv 2310.06825): pre-norm, RoPE, grouped queries,
SwiGLU."""

from collections.abc import Callable
from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader
from maxlm.models.families.rope import read_positions, write_positions

OUTER: NameTable = {
    "model.embed_tokens.weight": copy("embedding.table"),
    "model.norm.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}
NORMS: NameTable = {
    "model.layers.{layer}.input_layernorm.weight": copy("attention_norm.scale"),
    "model.layers.{layer}.post_attention_layernorm.weight": copy("mlp_norm.scale"),
}
ATTENTION: NameTable = {
    "model.layers.{layer}.self_attn.q_proj.weight": linear("attention.query.kernel"),
    "model.layers.{layer}.self_attn.k_proj.weight": linear("attention.key.kernel"),
    "model.layers.{layer}.self_attn.v_proj.weight": linear("attention.value.kernel"),
    "model.layers.{layer}.self_attn.o_proj.weight": linear("attention.out.kernel"),
    "model.layers.{layer}.self_attn.q_proj.bias": linear("attention.query.bias"),
    "model.layers.{layer}.self_attn.k_proj.bias": linear("attention.key.bias"),
    "model.layers.{layer}.self_attn.v_proj.bias": linear("attention.value.bias"),
    "model.layers.{layer}.self_attn.o_proj.bias": linear("attention.out.bias"),
    "model.layers.{layer}.self_attn.q_norm.weight": copy("attention.query_norm.scale"),
    "model.layers.{layer}.self_attn.k_norm.weight": copy("attention.key_norm.scale"),
}
MLP: NameTable = {
    "model.layers.{layer}.mlp.gate_proj.weight": linear("mlp.gate.kernel"),
    "model.layers.{layer}.mlp.up_proj.weight": linear("mlp.up.kernel"),
    "model.layers.{layer}.mlp.down_proj.weight": linear("mlp.down.kernel"),
    "model.layers.{layer}.mlp.gate_proj.bias": linear("mlp.gate.bias"),
    "model.layers.{layer}.mlp.up_proj.bias": linear("mlp.up.bias"),
    "model.layers.{layer}.mlp.down_proj.bias": linear("mlp.down.bias"),
}
TABLE: NameTable = {**OUTER, **NORMS, **ATTENTION, **MLP}
# What is tied is stored a second time by some, as the head.
EMBEDDING: NameTable = {"model.embed_tokens.weight": copy("embedding.table", "lm_head.weight")}
# Angles of RoPE, which older files hold.
BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)


def tie_embeddings(table: NameTable) -> Callable[[DecoderConfig], NameTable]:
    """Returns a function of the config: the table, with the head tied where the model ties it."""
    return lambda config: {**table, **EMBEDDING} if config.tie_embeddings else table


def read_common(
    reader: ConfigReader, *, kv_heads: int | None = None, head_dim: int | None = None, **rope: Any
) -> dict[str, Any]:
    """Reads what all of Llama's relatives have: sizes, heads, RoPE, RMSNorm, ties; not the FFN.

    Args:
        kv_heads, head_dim: where the file does not name them; None: as many as heads, and the
            width over the heads.
        rope: of ``read_positions``.
    """
    heads, width = reader.size("num_attention_heads"), reader.size("hidden_size")
    size: int = reader.size("head_dim", head_dim, nullable=True) or width // heads
    # The second name is that of early files.
    length = reader.size("max_position_embeddings", also="max_sequence_length")
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "d_model": width,
        "max_seq_len": length,
        "attention": {
            "num_heads": heads,
            "num_kv_heads": reader.size("num_key_value_heads", kv_heads, nullable=True) or heads,
            "head_dim": size,
        },
        "norm": {"kind": "rmsnorm", "eps": reader.number("rms_norm_eps")},
        "positions": read_positions(reader, size, **rope),
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
    }


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`read_common`."""
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **write_positions(config.positions, attention.head_dim),
    }


def read_swiglu(reader: ConfigReader, width: str = "intermediate_size") -> dict[str, Any]:
    """Returns a gated FFN's settings."""
    act = reader.require("hidden_act", "silu")
    return {"d_ff": reader.size(width), "activation": act, "gated": True}


def _read(reader: ConfigReader) -> dict[str, Any]:
    settings = read_common(reader)
    reader.require("rope_interleaved", False)
    bias = reader.flag("attention_bias", False)
    settings["attention"] |= {"bias": bias}
    settings["mlp"] = read_swiglu(reader) | {"bias": reader.flag("mlp_bias", False)}
    return settings


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **write_common(config),
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": config.mlp.activation,
        "attention_bias": config.attention.bias,
        "mlp_bias": config.mlp.bias,
    }


def _read_mistral(reader: ConfigReader) -> dict[str, Any]:
    settings = read_common(reader, kv_heads=8)
    settings["attention"] |= {"window": reader.size("sliding_window", 4096, nullable=True)}
    return settings | {"mlp": read_swiglu(reader)}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **write_common(config),
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": config.mlp.activation,
        "sliding_window": config.attention.window,
    }


_KIN = tie_embeddings(TABLE), BUFFERS
LLAMA = ModelFamily("llama", "llama", "LlamaForCausalLM", _read, _write, *_KIN)
MISTRAL = ModelFamily(
    "mistral", "mistral", "MistralForCausalLM", _read_mistral, _write_mistral, *_KIN
)
