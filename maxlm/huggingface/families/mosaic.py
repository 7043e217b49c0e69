"""MosaicML's MPT (2023): ALiBi, no biases, LayerNorm without offsets; and DBRX
(Databricks 2024): sixteen experts, four a token, the same LayerNorm, projections cut
off at ± 8."""

from typing import Any

from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import QKV_KERNELS, copy, linear, unstack_experts
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

B = "transformer.blocks.{layer}"
MPT_TABLE = {
    "transformer.wte.weight": copy("embedding.table", "lm_head.weight"),
    f"{B}.norm_1.weight": copy("attention_norm.scale"),
    f"{B}.attn.Wqkv.weight": linear(*QKV_KERNELS),
    f"{B}.attn.out_proj.weight": linear("attention.out.kernel"),
    f"{B}.norm_2.weight": copy("mlp_norm.scale"),
    f"{B}.ffn.up_proj.weight": linear("mlp.up.kernel"),
    f"{B}.ffn.down_proj.weight": linear("mlp.down.kernel"),
    "transformer.norm_f.weight": copy("final_norm.scale"),
}
DBRX_TABLE = {
    "transformer.wte.weight": copy("embedding.table"),
    f"{B}.norm_attn_norm.norm_1.weight": copy("attention_norm.scale"),
    f"{B}.norm_attn_norm.attn.Wqkv.weight": linear(*QKV_KERNELS),
    f"{B}.norm_attn_norm.attn.out_proj.weight": linear("attention.out.kernel"),
    f"{B}.norm_attn_norm.norm_2.weight": copy("mlp_norm.scale"),
    f"{B}.ffn.router.layer.weight": linear("moe.router"),
    f"{B}.ffn.experts.mlp.w1": unstack_experts("moe.gate", same_orientation=False),
    f"{B}.ffn.experts.mlp.v1": unstack_experts("moe.up", same_orientation=False),
    f"{B}.ffn.experts.mlp.w2": unstack_experts("moe.down", same_orientation=True),
    "transformer.norm_f.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = reader.read_nested("attn_config")
    rope = reader.read_nested("rope_parameters")
    rope.read_implemented("rope_type", "default")
    theta = attention.number("rope_theta", rope.number("rope_theta", 10_000.0))
    # The published code reads one, the library the other.
    rope.read_implemented("rope_theta", None, theta)
    settings["positions"] = {"kind": "rope", "theta": theta}
    ffn = reader.read_nested("ffn_config")
    ffn.read_implemented("hidden_size", None, settings["d_model"])


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.positions.theta,
        }
    }


MPT = ModelFamily(
    "mpt",
    "MptForCausalLM",
    {
        **fields.map_sizes("n_layers", "d_model", "max_seq_len", "n_heads"),
        "attn_config.clip_qkv": fields.map_number("attention.clip", None),
        "attn_config.softmax_scale": fields.map_number("attention.scale", None),
        "attn_config.alibi": fields.require_value(True, always_write=True),
        # The published code has these two values whatever the file says.
        "attn_config.alibi_bias_max": fields.require_value(8),
        "expansion_ratio": fields.require_value(4, always_write=True),
        "attn_config.attn_type": fields.require_value("multihead_attention"),
        "attn_config.qk_ln": fields.require_value(False),
        "attn_config.prefix_lm": fields.require_value(False),
        "attn_config.attn_uses_sequence_id": fields.require_value(False),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "no_bias": fields.require_value(True, always_write=True),
        "norm_type": fields.require_value("low_precision_layernorm"),
        "logit_scale": fields.require_value(None),
        "embedding_fraction": fields.require_value(1.0),
    },
    MPT_TABLE,
    {
        "mlp.activation": "gelu",
        "mlp.gated": False,
        "norm.kind": "layernorm",
        "positions.kind": "alibi",
    },
    other_hf_architectures=["MPTForCausalLM"],
    ignored_keys=[
        "init_config",
        "init_device",
        "learned_pos_emb",
        "tokenizer_name",
        "verbose",
    ],
)
DBRX = ModelFamily(
    "dbrx",
    "DbrxForCausalLM",
    {
        **fields.map_sizes("n_layers", "d_model", "max_seq_len", "n_heads"),
        "attn_config.kv_n_heads": fields.map_size("attention.num_kv_heads", 1),
        "attn_config.clip_qkv": fields.map_number("attention.clip", None),
        "attn_config.rope_theta": fields.map_number("positions.theta", None),
        "ffn_config.hidden_size": fields.ConfigField(
            lambda reader, key: None, write=lambda config: config.d_model
        ),
        "ffn_config.ffn_hidden_size": fields.map_size("moe.d_ff"),
        "ffn_config.ffn_act_fn.name": fields.require_value(
            "silu", ours="moe.activation"
        ),
        "ffn_config.moe_num_experts": fields.map_size("moe.num_experts"),
        "ffn_config.moe_top_k": fields.map_size("moe.experts_per_token"),
        "ffn_config.moe_normalize_expert_weights": fields.require_value(
            1.0, 1, always_write=True
        ),
        "ffn_config.moe_loss_weight": fields.map_balance_loss(0.01, "moe_top_k"),
        # Noise, in training alone.
        "ffn_config.moe_jitter_eps": fields.require_value(None, 0, 0.01),
        "ffn_config.uniform_expert_assignment": fields.require_value(False),
        "tie_word_embeddings": fields.require_value(False, ours="tie_embeddings"),
    },
    DBRX_TABLE,
    {"norm.kind": "layernorm", "norm.eps": 1e-5},
    read_extra=_read,
    write_extra=_write,
    # Each says again what a nested mapping says, which the published code reads.
    ignored_keys=["router_aux_loss_coef", "num_key_value_heads"],
)
