"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434): latent attention, many small
experts with shared ones beside them, a dense layer first."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama, qwen
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import copy, linear, map_linear, permute_rotary, split_heads
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader
from maxlm.models.families.rope import read_positions, write_positions

A = "model.layers.{layer}.self_attn"
S = "model.layers.{layer}.mlp.shared_experts"


def _table(config: DecoderConfig) -> NameTable:
    latent = config.attention.latent
    assert latent is not None
    query = permute_rotary(linear("attention.query.kernel"), latent.rotary_dim, each_head=True)
    down = permute_rotary(
        linear("attention.key_down.kernel", "attention.key_rotary.kernel"),
        latent.rotary_dim,
        each_head=False,
    )
    bias = linear("attention.key_down.bias", "attention.key_rotary.bias")
    return {
        **llama.tie_embeddings(llama.OUTER)(config),
        **llama.NORMS,
        **llama.MLP,
        **qwen.EXPERTS,
        f"{A}.q_proj.weight" if latent.q_rank is None else f"{A}.q_b_proj.weight": query,
        **map_linear(f"{A}.q_a_proj", "attention.query_down"),
        f"{A}.q_a_layernorm.weight": copy("attention.query_norm.scale"),
        f"{A}.kv_a_proj_with_mqa.weight": down,
        f"{A}.kv_a_proj_with_mqa.bias": permute_rotary(bias, latent.rotary_dim, each_head=False),
        f"{A}.kv_a_layernorm.weight": copy("attention.key_norm.scale"),
        f"{A}.kv_b_proj.weight": split_heads(
            "attention.key_up.kernel", "attention.value_up.kernel"
        ),
        **map_linear(f"{A}.o_proj", "attention.out"),
        f"{S}.gate_proj.weight": linear("moe.shared.gate.kernel"),
        f"{S}.up_proj.weight": linear("moe.shared.up.kernel"),
        f"{S}.down_proj.weight": linear("moe.shared.down.kernel"),
    }


def _read(reader: ConfigReader) -> dict[str, Any]:
    heads, rotary_dim = reader.size("num_attention_heads"), reader.size("qk_rope_head_dim")
    reader.require("num_key_value_heads", heads)
    reader.require("norm_topk_prob", False)  # published with all; implementations differ in true
    reader.require("scoring_func", "softmax")
    reader.require("moe_layer_freq", 1)
    for derived in ("head_dim", "qk_head_dim"):
        reader.get(derived, None)
    act, bias = reader.require("hidden_act", "silu"), reader.flag("attention_bias", False)
    limited = reader.require("topk_method", "greedy", "group_limited_greedy") != "greedy"
    groups, chosen = reader.size("n_group", None), reader.size("topk_group", None)
    if not limited or groups == chosen:
        groups = chosen = 1
    layers, dense = reader.size("num_hidden_layers"), reader.get("first_k_dense_replace", 0)
    if type(dense) is not int or not 0 <= dense < layers:
        raise MaxlmError(
            f"first_k_dense_replace={dense!r} leaves no layer of {layers} with experts",
            where=reader.where,
            fix="take it from the published model",
        )
    mlp = {
        "d_ff": reader.size("intermediate_size", 11_008),
        "activation": act,
        "bias": reader.require("mlp_bias", False),
    }
    return {
        "architecture": "decoder",
        "vocab_size": reader.size("vocab_size"),
        "num_layers": layers,
        "d_model": reader.size("hidden_size"),
        "max_seq_len": reader.size("max_position_embeddings"),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": reader.size("qk_nope_head_dim") + rotary_dim,
            "bias": bias,
            "latent": {
                "q_rank": reader.size("q_lora_rank", nullable=True),
                "kv_rank": reader.size("kv_lora_rank"),
                "rotary_dim": rotary_dim,
                "value_dim": reader.size("v_head_dim"),
            },
        },
        "mlp": mlp if dense else None,
        "moe": {
            "num_experts": reader.size("n_routed_experts"),
            "experts_per_token": reader.size("num_experts_per_tok"),
            "d_ff": reader.size("moe_intermediate_size"),
            "activation": act,
            "shared_experts": reader.size("n_shared_experts", 2, nullable=True) or 0,
            "renormalise": False,
            "scale": reader.number("routed_scaling_factor", 1.0),
            "balance_loss": reader.number("aux_loss_alpha", 0.001, least=0),
            "groups": groups,
            "groups_per_token": chosen,
        },
        "dense_layers": dense,
        "norm": {"kind": "rmsnorm", "eps": reader.require("rms_norm_eps", 1e-6)},
        "positions": read_positions(reader, rotary_dim),
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention, moe, mlp = config.attention, config.moe, config.mlp
    latent = attention.latent
    assert latent is not None
    assert moe is not None
    limited = moe.groups_per_token < moe.groups
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "max_position_embeddings": config.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_rope_head_dim": latent.rotary_dim,
        "qk_nope_head_dim": attention.head_dim - latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "attention_bias": attention.bias,
        **({"intermediate_size": mlp.d_ff} if mlp else {}),
        "moe_intermediate_size": moe.d_ff,
        "hidden_act": moe.activation,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "n_shared_experts": moe.shared_experts or None,
        "norm_topk_prob": False,
        "routed_scaling_factor": moe.scale,
        "aux_loss_alpha": moe.balance_loss,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "first_k_dense_replace": config.dense_layers,
        "rms_norm_eps": config.norm.eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **write_positions(config.positions, latent.rotary_dim),
    }


DEEPSEEK_V2 = ModelFamily(
    "deepseek_v2", "deepseek_v2", "DeepseekV2ForCausalLM", _read, _write, _table, llama.BUFFERS
)
