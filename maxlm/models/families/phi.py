"""Phi-2 (Javaheripi et al. 2023; block of Gunasekar et al. 2023, arXiv 2306.11644) and Phi-3 (Abdin
et al. 2024, arXiv 2404.14219)."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import Family
from maxlm.models.families.forms import head, linear, same
from maxlm.models.families.gpt2 import activation, published_activation
from maxlm.models.families.names import Table
from maxlm.models.families.reader import Reader
from maxlm.models.families.rope import read_positions, write_positions

L = "model.layers.{layer}"
PHI_TABLE: Table = {
    **{
        f"{L}.self_attn.{short}_proj.{part}": linear(f"attention.{name}.{ours}")
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for part, ours in (("weight", "kernel"), ("bias", "bias"))
    },
    "model.embed_tokens.weight": same("embedding.table"),
    f"{L}.input_layernorm.weight": same("attention_norm.scale"),
    f"{L}.input_layernorm.bias": same("attention_norm.bias"),
    f"{L}.self_attn.dense.weight": linear("attention.out.kernel"),
    f"{L}.self_attn.dense.bias": linear("attention.out.bias"),
    f"{L}.self_attn.q_layernorm.weight": same("attention.query_norm.scale"),
    f"{L}.self_attn.q_layernorm.bias": same("attention.query_norm.bias"),
    f"{L}.self_attn.k_layernorm.weight": same("attention.key_norm.scale"),
    f"{L}.self_attn.k_layernorm.bias": same("attention.key_norm.bias"),
    f"{L}.mlp.fc1.weight": linear("mlp.up.kernel"),
    f"{L}.mlp.fc1.bias": linear("mlp.up.bias"),
    f"{L}.mlp.fc2.weight": linear("mlp.down.kernel"),
    f"{L}.mlp.fc2.bias": linear("mlp.down.bias"),
    "model.final_layernorm.weight": same("final_norm.scale"),
    "model.final_layernorm.bias": same("final_norm.bias"),
    "lm_head.weight": head("head.kernel"),
    "lm_head.bias": same("head_bias"),
}
QKV = ("attention.query.kernel", "attention.key.kernel", "attention.value.kernel")
PHI3_TABLE: Table = {
    **llama.OUTER,
    **llama.NORMS,
    f"{L}.self_attn.qkv_proj.weight": linear(*QKV),
    f"{L}.self_attn.o_proj.weight": linear("attention.out.kernel"),
    f"{L}.mlp.gate_up_proj.weight": linear("mlp.gate.kernel", "mlp.up.kernel"),
    f"{L}.mlp.down_proj.weight": linear("mlp.down.kernel"),
}


def _read_phi(reader: Reader) -> dict[str, Any]:
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
        "mlp": {
            "d_ff": reader.size("intermediate_size"),
            "activation": activation(reader, "hidden_act", "gelu_new"),
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": reader.number("layer_norm_eps", 1e-5), "bias": True},
        "placement": "parallel_shared",
        "positions": read_positions(reader, width // heads, partial=0.5),
        "tie_embeddings": reader.only("tie_word_embeddings", False),
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
        "hidden_act": published_activation(config.mlp.activation),
        "layer_norm_eps": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
        **write_positions(config.positions, attention.head_dim),
    }


def _read_phi3(reader: Reader) -> dict[str, Any]:
    settings = llama.read_common(reader, partial=1.0)
    settings["attention"] |= {
        "bias": reader.only("attention_bias", False),
        "window": reader.size("sliding_window", None),
    }
    reader.get("original_max_position_embeddings", None)  # of longrope, which is refused
    return settings | {"mlp": llama.swiglu(reader)}


def _write_phi3(config: DecoderConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **llama.write_common(config),
        "intermediate_size": config.mlp.d_ff,
        "hidden_act": config.mlp.activation,
        "sliding_window": config.attention.window,
        "pad_token_id": None,  # the library's own lies outside smaller vocabularies
    }


PHI = Family("phi", "phi", "PhiForCausalLM", _read_phi, _write_phi, lambda config: PHI_TABLE)
PHI3 = Family("phi3", "phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, llama.tied(PHI3_TABLE))
