"""DBRX (Databricks 2024): sixteen experts, four a token, LayerNorm without offsets, projections cut
off at ± 8."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear, unstack_experts
from maxlm.models.families.mpt import NESTED
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

B = "transformer.blocks.{layer}"
QKV = ("attention.query.kernel", "attention.key.kernel", "attention.value.kernel")


TABLE: NameTable = {
    "transformer.wte.weight": copy("embedding.table"),
    f"{B}.norm_attn_norm.norm_1.weight": copy("attention_norm.scale"),
    f"{B}.norm_attn_norm.attn.Wqkv.weight": linear(*QKV),
    f"{B}.norm_attn_norm.attn.out_proj.weight": linear("attention.out.kernel"),
    f"{B}.norm_attn_norm.norm_2.weight": copy("mlp_norm.scale"),
    f"{B}.ffn.router.layer.weight": linear("moe.router"),
    f"{B}.ffn.experts.mlp.w1": unstack_experts("moe.gate", same_orientation=False),
    f"{B}.ffn.experts.mlp.v1": unstack_experts("moe.up", same_orientation=False),
    f"{B}.ffn.experts.mlp.w2": unstack_experts("moe.down", same_orientation=True),
    "transformer.norm_f.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    width, heads = reader.size("d_model"), reader.size("n_heads")
    own, ffn = reader.read_nested("attn_config", *NESTED), reader.read_nested("ffn_config", *NESTED)
    rope = reader.read_nested("rope_parameters")
    rope.require("rope_type", "default")
    theta = own.number("rope_theta", rope.number("rope_theta", 10_000.0))
    rope.require("rope_theta", None, theta)  # the published code reads one, the library the other
    kv_heads, clip = own.size("kv_n_heads", 1), own.number("clip_qkv", None)
    act = ffn.read_nested("ffn_act_fn")
    k = ffn.size("moe_top_k")
    ffn.require("moe_jitter_eps", None, 0, 0.01)  # noise, in training alone
    ffn.require("moe_normalize_expert_weights", 1, 1.0)
    ffn.require("uniform_expert_assignment", False)
    ffn.require("hidden_size", None, width)
    moe = {
        "num_experts": ffn.size("moe_num_experts"),
        "experts_per_token": k,
        "d_ff": ffn.size("ffn_hidden_size"),
        "activation": act.require("name", "silu"),
        "gated": True,
        # Its shares of assignments sum to k, ours to 1.
        "balance_loss": ffn.number("moe_loss_weight", 0.01, least=0) * k,
    }
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": reader.size("n_layers"),
        "d_model": width,
        "max_seq_len": reader.size("max_seq_len"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": width // heads,
            "clip": clip,
        },
        "moe": moe,
        "norm": {"kind": "layernorm", "eps": 1e-5},
        "positions": {"kind": "rope", "theta": theta},
        "tie_embeddings": reader.require("tie_word_embeddings", False),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe, attention, theta = config.moe, config.attention, config.positions.theta
    assert moe is not None
    return {
        "vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "d_model": config.d_model,
        "n_heads": attention.num_heads,
        "max_seq_len": config.max_seq_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attn_config": {
            "kv_n_heads": attention.num_kv_heads,
            "clip_qkv": attention.clip,
            "rope_theta": theta,
        },
        "ffn_config": {
            "hidden_size": config.d_model,
            "ffn_hidden_size": moe.d_ff,
            "ffn_act_fn": {"name": moe.activation},
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.experts_per_token,
            "moe_normalize_expert_weights": 1.0,
            "moe_loss_weight": moe.balance_loss / moe.experts_per_token,
        },
    }


DBRX = ModelFamily(
    "dbrx",
    "dbrx",
    "DbrxForCausalLM",
    _read,
    _write,
    lambda config: TABLE,
    # Each says again what a nested mapping says, which the published code reads.
    inert=["router_aux_loss_coef", "num_key_value_heads"],
)
