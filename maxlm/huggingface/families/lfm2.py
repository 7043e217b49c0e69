"""LFM2 (Liquid AI 2025, arXiv 2511.23404): gated short convolutions with attention
between, norms of query and key heads, RoPE, SwiGLU; and its mixtures of experts, scored
by sigmoids, behind dense layers."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, depthwise, linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.short_conv import ShortConvConfig

L = "model.layers.{layer}"
_GATES = ("in_gate", "out_gate", "value")
TABLE = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    "model.embedding_norm.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
    f"{L}.operator_norm.weight": copy("attention_norm.scale"),
    f"{L}.ffn_norm.weight": copy("mlp_norm.scale"),
    **map_linears(f"{L}.self_attn", "attention", **llama.PROJECTIONS, out_proj="out"),
    f"{L}.self_attn.q_layernorm.weight": copy("attention.query_norm.scale"),
    f"{L}.self_attn.k_layernorm.weight": copy("attention.key_norm.scale"),
    f"{L}.conv.in_proj.weight": linear(*(f"short_conv.{g}.kernel" for g in _GATES)),
    f"{L}.conv.in_proj.bias": linear(*(f"short_conv.{g}.bias" for g in _GATES)),
    f"{L}.conv.conv.weight": depthwise("short_conv.conv_weight"),
    f"{L}.conv.conv.bias": copy("short_conv.conv_bias"),
    f"{L}.conv.out_proj.weight": linear("short_conv.out.kernel"),
    f"{L}.conv.out_proj.bias": linear("short_conv.out.bias"),
    **map_linears(f"{L}.feed_forward", "mlp", w1="gate", w3="up", w2="down"),
}
_SETTINGS: fields.ConfigFields = {
    "conv_L_cache": fields.map_size("conv_width", 3, least=2),
    "conv_bias": fields.map_flag("bias", False),
}


def _read_layers(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    names = reader.names("layer_types")
    attention_layers = reader.indices("full_attn_idxs", num_layers)
    if not names and not reader.has("full_attn_idxs"):
        attention_layers = list(range(num_layers))
    kinds = ["conv"] * num_layers
    for layer in attention_layers:
        kinds[layer] = "attention"
    if names:
        by_name = {"conv": "conv", "full_attention": "attention"}
        if len(names) != num_layers or not set(names) <= by_name.keys():
            message = "layer_types does not name each layer's kind"
            fix = f"name {num_layers}, each conv or full_attention"
            raise MaxlmError(message, where=reader.where, fix=fix)
        kinds = [by_name[name] for name in names]
    settings["kinds"]["attention"] = {}
    fields.name_layers(settings, kinds)
    settings["tie_embeddings"] = reader.flag(
        "tie_embedding", reader.flag("tie_word_embeddings", True)
    )


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read_layers(reader, settings)
    settings["mlp"]["d_ff"] = _read_width(reader)


def _read_moe(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read_layers(reader, settings)
    num_layers = settings["num_layers"]
    num_dense = reader.size("num_dense_layers", 2, least=0)
    settings["dense_layers"] = num_dense
    width = reader.size("intermediate_size", 7168)
    if num_dense >= num_layers:
        message = f"num_dense_layers={num_dense} of {num_layers} leave no experts"
        fix = "convert it as an Lfm2ForCausalLM"
        raise MaxlmError(message, where=reader.where, fix=fix)
    if num_dense:
        settings["mlp"] = {"d_ff": width}


def _read_width(reader: ConfigReader) -> int:
    """Reads the width of MLPs, which the published code cuts to two thirds and rounds
    up."""
    width = reader.size("intermediate_size", 12_288, alias="block_ff_dim")
    adjusts = reader.flag("block_auto_adjust_ff_dim", True)
    factor = reader.number("block_ffn_dim_multiplier", 1.0, nullable=True)
    multiple = reader.size("block_multiple_of", 256)
    if not adjusts:
        return width
    width = int(2 * width / 3)
    if factor is None:
        return width
    return -(-int(factor * width) // multiple) * multiple


def _write_layers(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    return {
        "layer_types": ["conv" if k == "conv" else "full_attention" for k in kinds],
        "tie_word_embeddings": config.tie_embeddings,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert config.mlp is not None
    return {
        **_write_layers(config),
        "intermediate_size": config.mlp.d_ff,
        "block_auto_adjust_ff_dim": False,
    }


def _write_moe(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    # Without dense layers nothing reads the width.
    width = moe.d_ff if config.mlp is None else config.mlp.d_ff
    return {
        **_write_layers(config),
        "num_dense_layers": config.dense_layers,
        "intermediate_size": width,
    }


_EXPERT = f"{L}.feed_forward.experts.{{expert}}"
MOE_TABLE = {
    **TABLE,
    f"{L}.feed_forward.gate.weight": linear("moe.router"),
    f"{L}.feed_forward.expert_bias": copy("moe.selection_bias"),
    f"{_EXPERT}.w1.weight": linear("moe.gate"),
    f"{_EXPERT}.w2.weight": linear("moe.down"),
    f"{_EXPERT}.w3.weight": linear("moe.up"),
}
_COMMON: fields.ConfigFields = {
    **fields.SIZES,
    "vocab_size": fields.map_size("vocab_size", 65_536),
    "max_position_embeddings": fields.map_size("max_seq_len", 128_000),
    **llama.map_kv_heads(8),
    "norm_eps": fields.map_number("norm.eps", 1e-5),
    **fields.map_in_mixer("kinds.conv.mixer", ShortConvConfig, _SETTINGS),
}
LFM2 = ModelFamily(
    "lfm2",
    "Lfm2ForCausalLM",
    _COMMON,
    TABLE,
    {
        "kinds.conv.mixer.kind": "short_conv",
        "attention.qk_norm": True,
        "mlp.activation": "silu",
    },
    rope_kwargs={"theta": 1_000_000.0},
    read_extra=_read,
    write_extra=_write,
    # What the published code does not read.
    ignored_keys=[
        *(
            "block_dim",
            "block_mlp_init_scale",
            "block_norm_eps",
            "block_out_init_scale",
        ),
        *("block_use_swiglu", "block_use_xavier_init", "conv_dim", "conv_dim_out"),
        *("conv_use_xavier_init", "num_heads", "theta", "use_pos_enc"),
    ],
)
LFM2_MOE = ModelFamily(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    {
        **_COMMON,
        "num_experts": fields.map_size(
            "moe.num_experts", 32, alias="num_local_experts"
        ),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token", 4),
        "moe_intermediate_size": fields.map_size("moe.d_ff", 1792),
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "routed_scaling_factor": fields.map_number("moe.scale", 1.0),
        "use_expert_bias": fields.map_flag("moe.selection_bias", True),
    },
    MOE_TABLE,
    {
        "kinds.conv.mixer.kind": "short_conv",
        "attention.qk_norm": True,
        "moe.activation": "silu",
        "moe.score": "sigmoid",
        "moe.renormalise_eps": 1e-6,
        "moe.balance_loss": 0.0,
    },
    rope_kwargs={"theta": 1_000_000.0},
    read_extra=_read_moe,
    write_extra=_write_moe,
    ignored_keys=["conv_dim", "conv_dim_out", "num_heads", "theta", "use_pos_enc"],
)
