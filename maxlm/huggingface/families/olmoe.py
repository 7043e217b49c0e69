"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): many small experts, whose weights
are not renormalised, behind attention with norms of queries and keys over all heads at
once."""

from maxlm.huggingface.families import fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import linear

L = "model.layers.{layer}"
OLMOE = ModelFamily(
    "olmoe",
    "OlmoeForCausalLM",
    {
        **llama.COMMON,
        **llama.EXPERTS,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", False),
        "num_experts": fields.map_size("moe.num_experts", alias="num_local_experts"),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "norm_topk_prob": fields.map_flag("moe.renormalise", False),
        "router_aux_loss_coef": fields.map_balance_loss(0.01),
        # It would cut off what the norms give, not what the maps do.
        "clip_qkv": fields.require_value(None),
    },
    {
        **llama.TABLE,
        **qwen.EXPERTS,
        # One vector over all heads.
        f"{L}.self_attn.q_norm.weight": linear("attention.query_norm.scale"),
        f"{L}.self_attn.k_norm.weight": linear("attention.key_norm.scale"),
    },
    {"attention.qk_norm": True, "attention.qk_norm_form": "all_heads"},
    rope_kwargs={},
)
