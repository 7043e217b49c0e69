"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624) and Nemotron 3 (NVIDIA 2025): layers of a
Mamba-2 state space, attention without positions, an MLP or experts alone, in a list of
all layers; squared ReLU, experts of narrow vectors. Layers that predict later tokens
are left out, as transformers leaves them out."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, mamba2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    copy,
    either,
    linear,
    map_linear,
    map_linears,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config
from maxlm.models.layers.moe import MoeConfig

L = "backbone.layers.{layer}"
M = f"{L}.mixer"
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KIND_OF_NAME = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    # As before transformers 5.
    "mamba": "mamba",
    "attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
_NAME_OF_KIND = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "mlp": "mlp",
    "moe": "moe",
}
_EXPERT = f"{M}.experts.{{expert}}"
TABLE = {
    **mamba2.OUTER,
    f"{L}.norm.weight": either(copy("attention_norm.scale"), copy("mlp_norm.scale")),
    **mamba2.map_mamba2(M),
    **map_linears(M, "attention", q_proj="query", k_proj="key", v_proj="value"),
    **map_linear(f"{M}.o_proj", "attention.out"),
    **map_linears(M, "mlp", up_proj="up", down_proj="down"),
    f"{M}.gate.weight": linear("moe.router"),
    f"{M}.gate.e_score_correction_bias": copy("moe.selection_bias"),
    f"{_EXPERT}.up_proj.weight": linear("moe.up"),
    f"{_EXPERT}.down_proj.weight": linear("moe.down"),
    f"{M}.fc1_latent_proj.weight": linear("moe.latent_down.kernel"),
    f"{M}.fc2_latent_proj.weight": linear("moe.latent_up.kernel"),
    **map_linears(f"{M}.shared_experts", "moe.shared", up_proj="up", down_proj="down"),
}
_SETTINGS: fields.ConfigFields = {
    "mamba_num_heads": fields.map_size("num_heads", 128),
    "mamba_head_dim": fields.map_size("head_dim", 64),
    "ssm_state_size": fields.map_size("state_size", 128),
    "n_groups": fields.map_size("num_groups", 8, alias="mamba_n_groups"),
    "conv_kernel": fields.map_size("conv_width", 4, alias="mamba_d_conv"),
    "use_bias": fields.map_flag("bias", False),
    "use_conv_bias": fields.map_flag("conv_bias", True),
    "mamba_hidden_act": fields.require_value("silu", always_write=True),
    # The published code cuts time steps off below this, and reads no other limit.
    "time_step_min": fields.map_number("min_step", 0.001, least=0),
}


def _read_kinds(reader: ConfigReader) -> list[str]:
    """Reads the kind of each layer."""
    names = reader.names("layers_block_type") or reader.names("layer_types")
    letters = reader.text("hybrid_override_pattern", "")
    table = _KIND_OF_NAME if names else _LETTERS
    entries = names or list(letters)
    for entry in entries:
        if entry not in table:
            message = f"a layer of kind {entry!r} is not implemented"
            fix = f"only {', '.join(table)} can be converted"
            raise MaxlmError(message, where=reader.where, fix=fix)
    if not entries:
        message = "neither layers_block_type nor hybrid_override_pattern"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return [table[entry] for entry in entries]


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    kinds = _read_kinds(reader)
    settings["num_layers"] = len(kinds)
    reader.read_implemented("num_hidden_layers", None, len(kinds))
    activation = fields.read_activation(reader, "mlp_hidden_act", "relu2")
    bias = reader.flag("mlp_bias", False)
    if "mlp" in kinds:
        settings["mlp"] = {
            "d_ff": reader.size("intermediate_size", 21_504),
            "activation": activation,
            "gated": False,
            "bias": bias,
        }
    if "moe" in kinds:
        settings["moe"] = _read_experts(reader, activation)
        reader.read_implemented("mlp_bias", False)
    layer_kinds = settings.setdefault("kinds", {})
    layer_kinds.setdefault("mamba", {})["ffn"] = "none"
    layer_kinds["attention"] = {"ffn": "none"}
    layer_kinds["mlp"] = {"mixer": "none", "ffn": "mlp"}
    layer_kinds["moe"] = {"mixer": "none", "ffn": "moe"}
    fields.name_layers(settings, kinds)


def _read_experts(reader: ConfigReader, activation: str) -> dict[str, Any]:
    groups = reader.size("n_group", 1)
    return {
        "num_experts": reader.size("n_routed_experts", 8),
        "experts_per_token": reader.size("num_experts_per_tok", 2),
        "d_ff": reader.size("moe_intermediate_size", 7688),
        "activation": activation,
        "gated": False,
        "latent_dim": reader.size("moe_latent_size", None, nullable=True),
        "shared_experts": 1,
        "shared_d_ff": reader.size("moe_shared_expert_intermediate_size", 7688),
        "score": "sigmoid",
        "selection_bias": True,
        "renormalise": reader.flag("norm_topk_prob", True),
        "scale": reader.number("routed_scaling_factor", 1.0),
        "groups": groups,
        "groups_per_token": reader.size("topk_group", 1),
        "group_score": "top2" if groups > 1 else "max",
        "balance_loss": 0.0,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    values: dict[str, Any] = {
        "layers_block_type": [_NAME_OF_KIND[kind] for kind in kinds]
    }
    if config.mlp is not None:
        values["intermediate_size"] = config.mlp.d_ff
        values["mlp_bias"] = config.mlp.bias
        values["mlp_hidden_act"] = _write_activation(config.mlp.activation)
    if config.moe is not None:
        values |= _write_experts(config.moe)
    return values


def _write_activation(name: object) -> str:
    assert isinstance(name, str)
    return fields.to_hf_activation(name)


def _write_experts(moe: MoeConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_ff,
        "mlp_hidden_act": _write_activation(moe.activation),
        "moe_latent_size": moe.latent_dim,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": moe.shared_d_ff,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
    }


NEMOTRON_H = ModelFamily(
    "nemotron_h",
    "NemotronHForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size", 131_072),
        "hidden_size": fields.map_size("d_model", 4096),
        "max_position_embeddings": fields.map_size("max_seq_len", 4096),
        "num_attention_heads": fields.map_size("attention.num_heads", 32),
        "num_key_value_heads": fields.map_size("attention.num_kv_heads", 8),
        "head_dim": fields.map_size("attention.head_dim", 128),
        "attention_bias": fields.map_flag("attention.bias", False),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        **fields.map_in_mixer("kinds.mamba.mixer", Mamba2Config, _SETTINGS),
    },
    TABLE,
    {"positions.kind": "none", "kinds.mamba.mixer.kind": "mamba2"},
    read_extra=_read,
    write_extra=_write,
    prefix="backbone.",
    ignored_tensors=("mtp.*",),
    # What the published code does not read, and what makes no difference in the result.
    ignored_keys=[
        *mamba2.INERT,
        *("expand", "mamba_expand", "mamba_proj_bias", "mamba_ssm_cache_dtype"),
        *("moe_shared_expert_overlap", "num_logits_to_keep", "sliding_window"),
        *("time_step_limit", "mamba_dt_limit", "use_mamba_kernels"),
        *("num_nextn_predict_layers", "mtp_layers_block_type"),
        *("mtp_hybrid_override_pattern", "n_shared_experts", "attention_head_dim"),
        *("intermediate_size", "moe_intermediate_size", "n_routed_experts"),
        *("num_experts_per_tok", "moe_shared_expert_intermediate_size", "n_group"),
        *("moe_latent_size", "norm_topk_prob", "routed_scaling_factor", "topk_group"),
        "rope_theta",
    ],
)
