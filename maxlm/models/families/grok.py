"""Grok-1 (xAI 2024, its published code and weights), under the names of its safetensors port: eight
experts, two a token, norms before and after each branch, capped scores, scaled embeddings."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

L = "model.layers.{layer}"
E = f"{L}.moe_block.experts.{{expert}}"
TABLE: NameTable = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    f"{L}.pre_attn_norm.scale": copy("attention_norm.scale"),
    f"{L}.attn.q_proj.weight": linear("attention.query.kernel"),
    f"{L}.attn.k_proj.weight": linear("attention.key.kernel"),
    f"{L}.attn.v_proj.weight": linear("attention.value.kernel"),
    f"{L}.attn.o_proj.weight": linear("attention.out.kernel"),
    f"{L}.post_attn_norm.scale": copy("attention_post_norm.scale"),
    f"{L}.pre_moe_norm.scale": copy("mlp_norm.scale"),
    f"{L}.moe_block.gate.weight": linear("moe.router"),
    f"{E}.linear.weight": linear("moe.gate"),
    f"{E}.linear_v.weight": linear("moe.up"),
    f"{E}.linear_1.weight": linear("moe.down"),
    f"{L}.post_moe_norm.scale": copy("mlp_post_norm.scale"),
    "model.norm.scale": copy("final_norm.scale"),
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader)
    settings["attention"] |= {
        "scale": reader.number("attn_output_multiplier"),
        "soft_cap": reader.number("max_attn_value", 30.0),
    }
    k = reader.size("num_experts_per_tok")
    settings["moe"] = {
        "num_experts": reader.size("num_experts"),
        "experts_per_token": k,
        "d_ff": reader.size("intermediate_size"),
        "activation": "gelu_tanh",
        "gated": True,
        "renormalise": False,
        # Its shares of assignments sum to k, ours to 1.
        "balance_loss": reader.number("router_aux_loss_coef", 0.001, least=0) * k,
    }
    return settings | {
        "placement": "sandwich",
        "embedding_scale": reader.number("embedding_multiplier_scale"),
        "logit_scale": reader.number("output_multiplier_scale"),
        "tie_embeddings": reader.require("tie_word_embeddings", True),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe, attention = config.moe, config.attention
    assert moe is not None
    return {
        **llama.write_common(config),
        "attn_output_multiplier": attention.scale or attention.head_dim**-0.5,
        "max_attn_value": attention.soft_cap,
        "embedding_multiplier_scale": config.embedding_scale,
        "output_multiplier_scale": config.logit_scale,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "intermediate_size": moe.d_ff,
        "router_aux_loss_coef": moe.balance_loss / moe.experts_per_token,
    }


GROK1 = ModelFamily("grok1", "grok-1", "Grok1ModelForCausalLM", _read, _write, lambda config: TABLE)
