"""Phi-2 (Javaheripi et al. 2023; block of Gunasekar et al. 2023, arXiv 2306.11644) and Phi-3 (Abdin
et al. 2024, arXiv 2404.14219)."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear, map_linear, map_norm
from maxlm.models.families.gpt2 import plain_mlp_config, read_activation, to_hf_activation
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader
from maxlm.models.families.rope import read_positions, write_positions

L = "model.layers.{layer}"
PHI_TABLE: NameTable = {
    **map_linear(f"{L}.self_attn.q_proj", "attention.query"),
    **map_linear(f"{L}.self_attn.k_proj", "attention.key"),
    **map_linear(f"{L}.self_attn.v_proj", "attention.value"),
    "model.embed_tokens.weight": copy("embedding.table"),
    **map_norm(f"{L}.input_layernorm", "attention_norm"),
    **map_linear(f"{L}.self_attn.dense", "attention.out"),
    **map_norm(f"{L}.self_attn.q_layernorm", "attention.query_norm"),
    **map_norm(f"{L}.self_attn.k_layernorm", "attention.key_norm"),
    **map_linear(f"{L}.mlp.fc1", "mlp.up"),
    **map_linear(f"{L}.mlp.fc2", "mlp.down"),
    **map_norm("model.final_layernorm", "final_norm"),
    "lm_head.weight": linear("head.kernel"),
    "lm_head.bias": copy("head_bias"),
}
QKV = ("attention.query.kernel", "attention.key.kernel", "attention.value.kernel")
PHI3_TABLE: NameTable = {
    **llama.OUTER,
    **llama.NORMS,
    f"{L}.self_attn.qkv_proj.weight": linear(*QKV),
    f"{L}.self_attn.o_proj.weight": linear("attention.out.kernel"),
    f"{L}.mlp.gate_up_proj.weight": linear("mlp.gate.kernel", "mlp.up.kernel"),
    f"{L}.mlp.down_proj.weight": linear("mlp.down.kernel"),
}


def _read_phi(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_position_embeddings"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": reader.size("num_key_value_heads", None) or heads,
            "head_dim": width // heads,
            "bias": True,
            "qk_norm": reader.flag("qk_layernorm", False),
        },
        "mlp": plain_mlp_config(
            reader.size("intermediate_size"), read_activation(reader, "hidden_act", "gelu_new")
        ),
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_eps", 1e-5), "bias": True},
        "placement": "parallel_shared",
        "positions": read_positions(reader, width // heads, partial=0.5),
        "tie_embeddings": reader.require("tie_word_embeddings", False),
        "head_bias": True,
    }


def _write_phi(config: DecoderConfig) -> dict[str, Any]:
    attention = config.attention
    assert config.mlp is not None
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "qk_layernorm": attention.qk_norm,
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": to_hf_activation(config.mlp.activation),
        "layer_norm_eps": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
        **write_positions(config.positions, attention.head_dim),
    }


def _read_phi3(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader, partial=1.0)
    settings["attention"] |= {
        "bias": reader.require("attention_bias", False),
        "window": reader.size("sliding_window", None),
    }
    reader.get("original_max_position_embeddings", None)  # of longrope, which is refused
    return settings | {"mlp": llama.read_swiglu(reader)}


def _write_phi3(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **llama.write_common(config),
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": config.mlp.activation,
        "sliding_window": config.attention.window,
        "pad_token_id": None,  # the library's own lies outside smaller vocabularies
    }


PHI = ModelFamily("phi", "phi", "PhiForCausalLM", _read_phi, _write_phi, lambda config: PHI_TABLE)
PHI3 = ModelFamily(
    "phi3", "phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, llama.tie_embeddings(PHI3_TABLE)
)
