"""Hunyuan 3 (Tencent 2026, its published code and weights): DeepSeek-V3's experts
behind grouped attention with norms of queries and keys."""

from typing import Any

from maxlm.huggingface.families import deepseek, fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.modules import FINAL_NORM_MODULES
from maxlm.huggingface.families.names import copy, linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader

L = "model.layers.{layer}"
_EXPERT = f"{L}.mlp.experts.{{expert}}"
TABLE = {
    **llama.TABLE,
    f"{L}.mlp.router.gate.weight": linear("moe.router"),
    f"{L}.mlp.expert_bias": copy("moe.selection_bias"),
    f"{_EXPERT}.gate_proj.weight": linear("moe.gate"),
    f"{_EXPERT}.up_proj.weight": linear("moe.up"),
    f"{_EXPERT}.down_proj.weight": linear("moe.down"),
    **map_linears(f"{L}.mlp.shared_mlp", "moe.shared", **llama.SWIGLU_NAMES),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    deepseek.read_dense_list(reader, settings, 1)


HY_V3 = ModelFamily(
    "hy_v3",
    "HYV3ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        "head_dim": fields.map_size("attention.head_dim", 128),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.require_value(False),
        "num_experts": fields.map_size(
            "moe.num_experts", 192, alias="num_local_experts"
        ),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token", 8),
        "num_shared_experts": fields.map_size("moe.shared_experts", 1),
        "moe_intermediate_size": fields.map_size("moe.d_ff", 1536),
        "router_scaling_factor": fields.map_number("moe.scale", 2.826),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "enable_moe_fp32_combine": fields.ignore_key(),
    },
    TABLE,
    {
        "attention.qk_norm": True,
        "moe.score": "sigmoid",
        "moe.selection_bias": True,
        "moe.balance_loss": 0.0,
    },
    rope_kwargs={"theta": 11_158_840.0},
    read_extra=_read,
    write_extra=deepseek.write_dense_list,
    layers_for_more_tokens=L,
    modules=FINAL_NORM_MODULES,
    # Of modules that predict further tokens, which have the model's.
    ignored_tensors=[
        "model.layers.*.shared_head.*",
        "model.layers.*.embed_tokens.*",
    ],
    ignored_keys=["first_k_dense_replace"],
)
