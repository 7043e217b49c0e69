"""Grok-1 (xAI 2024, its published code and weights), under the names of its safetensors
port: eight experts, two a token, norms before and after each branch, capped scores,
scaled embeddings."""

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_linears

L = "model.layers.{layer}"
E = f"{L}.moe_block.experts.{{expert}}"
TABLE = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    f"{L}.pre_attn_norm.scale": copy("attention_norm.scale"),
    **map_linears(f"{L}.attn", "attention", **llama.PROJECTIONS, o_proj="out"),
    f"{L}.post_attn_norm.scale": copy("attention_post_norm.scale"),
    f"{L}.pre_moe_norm.scale": copy("mlp_norm.scale"),
    f"{L}.moe_block.gate.weight": linear("moe.router"),
    f"{E}.linear.weight": linear("moe.gate"),
    f"{E}.linear_v.weight": linear("moe.up"),
    f"{E}.linear_1.weight": linear("moe.down"),
    f"{L}.post_moe_norm.scale": copy("mlp_post_norm.scale"),
    "model.norm.scale": copy("final_norm.scale"),
}


GROK1 = ModelFamily(
    "grok1",
    "Grok1ModelForCausalLM",
    {
        **llama.COMMON,
        "attn_output_multiplier": fields.ConfigField(
            lambda reader, key: reader.number(key),
            "attention.scale",
            lambda config: config.score_scale(config.layer_kinds[0]),
        ),
        "max_attn_value": fields.map_number("attention.soft_cap", 30.0),
        "embedding_multiplier_scale": fields.map_number("embedding_scale"),
        "output_multiplier_scale": fields.map_number("logit_scale"),
        "num_experts": fields.map_size("moe.num_experts"),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token"),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "router_aux_loss_coef": fields.map_balance_loss(0.001),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
    },
    TABLE,
    {"moe.activation": "gelu_tanh", "moe.renormalise": False, "placement": "sandwich"},
    rope_kwargs={},
    hf_model_type="grok-1",
)
