"""MiniMax-M2 (MiniMax 2025, its published code and weights): norms of queries and keys
over all heads at once, part of each head turned, Mixtral's layout of experts, which are
scored by sigmoids and chosen with a bias."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear
from maxlm.huggingface.families.reader import ConfigReader

L = "model.layers.{layer}"
M2_TABLE = {
    **llama.MIXTRAL_TABLE,
    # One vector over all heads.
    f"{L}.self_attn.q_norm.weight": linear("attention.query_norm.scale"),
    f"{L}.self_attn.k_norm.weight": linear("attention.key_norm.scale"),
    f"{L}.block_sparse_moe.e_score_correction_bias": copy("moe.selection_bias"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    head_dim = settings["attention"]["head_dim"]
    positions = settings["positions"]
    # Published files name the dimensions that turn, transformers the share.
    rotary_dim = reader.size("rotary_dim", None)
    if rotary_dim is not None:
        if positions.get("rotary_dim", rotary_dim) != rotary_dim:
            reader.read_implemented("rotary_dim", positions["rotary_dim"])
        if rotary_dim != head_dim:
            positions["rotary_dim"] = rotary_dim


MINIMAX_M2 = ModelFamily(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        "head_dim": fields.map_size("attention.head_dim", 128, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "num_local_experts": fields.map_size("moe.num_experts", alias="num_experts"),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token"),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "router_aux_loss_coef": fields.map_balance_loss(0.001),
        "router_jitter_noise": fields.require_value(0.0),
        "scoring_func": fields.require_value("sigmoid"),
        "use_qk_norm": fields.require_value(True),
        "qk_norm_type": fields.require_value("per_layer"),
        "use_routing_bias": fields.require_value(True),
        "shared_intermediate_size": fields.require_value(0),
    },
    M2_TABLE,
    {
        "attention.qk_norm": True,
        "attention.qk_norm_form": "all_heads",
        "moe.score": "sigmoid",
        "moe.selection_bias": True,
    },
    rope_kwargs={"theta": 5_000_000.0, "partial": 1.0},
    read_extra=_read,
    layers_for_more_tokens=L,
    ignored_keys=[
        # Of layers that predict further tokens, which transformers has not either.
        *("mtp_transformer_layers", "num_mtp_modules", "use_mtp"),
        # All layers have attention; the published code reads none of these.
        *("attn_type_list", "max_model_len", "layernorm_full_attention_beta"),
        *("layernorm_linear_attention_beta", "layernorm_mlp_beta"),
    ],
)
