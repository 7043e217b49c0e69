"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): three layers of Kimi Delta Attention
and one of latent attention without positions, by turns; experts with sigmoid routing
behind a dense layer."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    copy_with_ones,
    depthwise,
    either,
    interleave_by_kv_head,
    linear,
    map_linears,
)
from maxlm.huggingface.families.qwen_hybrid import FULL, LINEAR, write_kinds
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.kimi_delta_attention import KimiDeltaAttentionConfig

L = "model.layers.{layer}"
A = f"{L}.self_attn"
E = f"{L}.block_sparse_moe"
DELTA = "kimi_delta_attention"
_MAPS = {
    "b_proj": "beta",
    "f_a_proj": "decay_down",
    "f_b_proj": "decay_up",
    "g_a_proj": "gate_down",
    "g_b_proj": "gate_up",
}
_CONVS = {"q_conv1d": "query_conv", "k_conv1d": "key_conv", "v_conv1d": "value_conv"}


def _make_table(config: TransformerConfig) -> NameTable:
    query_name = "q_proj" if config.attention.latent.q_rank is None else "q_b_proj"
    table: dict[str, Any] = {
        **llama.OUTER,
        **llama.NORMS,
        **llama.MLP,
        # Layers of both kinds have maps of these names.
        f"{A}.q_proj.weight": linear(f"{DELTA}.query.kernel"),
        f"{A}.k_proj.weight": linear(f"{DELTA}.key.kernel"),
        f"{A}.v_proj.weight": linear(f"{DELTA}.value.kernel"),
        f"{A}.o_proj.weight": either(
            linear(f"{DELTA}.out.kernel"), linear("attention.out.kernel")
        ),
        f"{A}.q_a_proj.weight": linear("attention.query_down.kernel"),
        f"{A}.q_a_layernorm.weight": copy("attention.query_norm.scale"),
        f"{A}.kv_a_proj_with_mqa.weight": linear(
            "attention.key_down.kernel", "attention.key_rotary.kernel"
        ),
        f"{A}.kv_a_layernorm.weight": copy("attention.key_norm.scale"),
        f"{A}.kv_b_proj.weight": interleave_by_kv_head(
            "attention.key_up.kernel", "attention.value_up.kernel"
        ),
        f"{A}.A_log": copy_with_ones(f"{DELTA}.A_log", before=2, behind=1),
        f"{A}.dt_bias": linear(f"{DELTA}.dt_bias"),
        f"{A}.o_norm.weight": copy(f"{DELTA}.norm.scale"),
        f"{E}.gate.weight": linear("moe.router"),
        f"{E}.gate.e_score_correction_bias": copy("moe.selection_bias"),
        f"{E}.experts.{{expert}}.w1.weight": linear("moe.gate"),
        f"{E}.experts.{{expert}}.w2.weight": linear("moe.down"),
        f"{E}.experts.{{expert}}.w3.weight": linear("moe.up"),
        **map_linears(f"{E}.shared_experts", "moe.shared", **llama.SWIGLU_NAMES),
    }
    for theirs, ours in _MAPS.items():
        table[f"{A}.{theirs}.weight"] = linear(f"{DELTA}.{ours}.kernel")
    for theirs, ours in _CONVS.items():
        table[f"{A}.{theirs}.weight"] = depthwise(f"{DELTA}.{ours}")
    query = linear("attention.query.kernel")
    name = f"{A}.{query_name}.weight"
    table[name] = either(table[name], query) if name in table else query
    return table


def _read_kinds(reader: ConfigReader, num_layers: int) -> list[str]:
    """Reads each layer's kind: the published file numbers those of each kind from 1,
    transformers names every layer's."""
    numbers = reader.read_nested("linear_attn_config")
    full = numbers.sizes("full_attn_layers")
    linear_ = numbers.sizes("kda_layers")
    if not full and not linear_:
        later = range(num_layers)
        usual = [FULL if layer and layer % 4 == 0 else LINEAR for layer in later]
        return list(fields.read_layer_types(reader, usual, (LINEAR, FULL)))
    reader.ignore("layer_types")  # which says the same
    if sorted([*full, *linear_]) != list(range(1, num_layers + 1)):
        message = f"full_attn_layers and kda_layers do not name {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return [FULL if layer + 1 in full else LINEAR for layer in range(num_layers)]


def _read_dense_layers(reader: ConfigReader, num_layers: int) -> int:
    """Reads the number of first layers without experts."""
    num_dense = reader.size("first_k_dense_replace", 1, least=0)
    names = reader.names("mlp_layer_types")
    if not names:
        return min(num_dense, num_layers)
    num_dense = names.count("dense")
    if names != ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense):
        message = "mlp_layer_types has dense layers behind others"
        fix = "convert a model whose dense layers come first"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return num_dense


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    num_heads = attention["num_heads"]
    reader.read_implemented("num_key_value_heads", num_heads)
    attention["num_kv_heads"] = num_heads
    rotary_dim = attention["latent"]["rotary_dim"]
    attention["head_dim"] = reader.size("qk_nope_head_dim", 128) + rotary_dim

    num_layers = settings["num_layers"]
    published = reader.read_nested("linear_attn_config")
    mixer: dict[str, Any] = {
        "kind": DELTA,
        "num_heads": published.size("num_heads", reader.size("linear_num_heads", 32)),
        "head_dim": published.size("head_dim", reader.size("linear_head_dim", 128)),
        "conv_width": published.size(
            "short_conv_kernel_size", reader.size("linear_conv_kernel_dim", 4), least=2
        ),
    }
    settings["kinds"] = {LINEAR: {"mixer": mixer}, FULL: {}}
    fields.name_layers(settings, _read_kinds(reader, num_layers))

    num_dense = _read_dense_layers(reader, num_layers)
    settings["dense_layers"] = num_dense
    mlp = {"d_ff": reader.size("intermediate_size", 9216)}
    if num_dense:
        settings["mlp"] = mlp
    groups = reader.size("n_group", 1, alias="num_expert_group")
    settings["moe"] |= {
        "groups": groups,
        "groups_per_token": reader.size("topk_group", 1),
        "group_score": "top2" if groups > 1 else "max",
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    attention = config.attention
    moe = config.moe
    assert moe is not None
    mixer = fields.find_mixer(config, KimiDeltaAttentionConfig)
    kinds = write_kinds(config)
    names = kinds["layer_types"]
    num_dense = config.dense_layers
    num_sparse = config.num_layers - num_dense
    values = {
        **kinds,
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": attention.head_dim - attention.latent.rotary_dim,
        "linear_num_heads": mixer.num_heads,
        "linear_head_dim": mixer.head_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
        # As the published code reads them.
        "linear_attn_config": {
            "full_attn_layers": _number_layers(names, FULL),
            "kda_layers": _number_layers(names, LINEAR),
            "num_heads": mixer.num_heads,
            "head_dim": mixer.head_dim,
            "short_conv_kernel_size": mixer.conv_width,
        },
        "mlp_layer_types": ["dense"] * num_dense + ["sparse"] * num_sparse,
        "first_k_dense_replace": num_dense,
        "num_expert_group": moe.groups,
        "topk_group": moe.groups_per_token,
    }
    if config.mlp is not None:
        values["intermediate_size"] = config.mlp.d_ff
    return values


def _number_layers(names: list[str], kind: str) -> list[int]:
    return [number for number, name in enumerate(names, 1) if name == kind]


KIMI_LINEAR = ModelFamily(
    "kimi_linear",
    "KimiLinearForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size", 163_840),
        "num_hidden_layers": fields.map_layer_count("num_layers", 27),
        "hidden_size": fields.map_size("d_model", 2304),
        "model_max_length": fields.map_size(
            "max_seq_len", 1_048_576, alias="max_position_embeddings"
        ),
        "num_attention_heads": fields.map_size("attention.num_heads", 32),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "attention_bias": fields.require_value(False),
        "q_lora_rank": fields.map_size("attention.latent.q_rank", None, nullable=True),
        "kv_lora_rank": fields.map_size("attention.latent.kv_rank", 512),
        "qk_rope_head_dim": fields.map_size("attention.latent.rotary_dim", 64),
        "v_head_dim": fields.map_size("attention.latent.value_dim", 128),
        "moe_intermediate_size": fields.map_size("moe.d_ff", 1024),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "num_experts": fields.map_size(
            "moe.num_experts", 256, alias="num_local_experts"
        ),
        "num_experts_per_token": fields.map_size(
            "moe.experts_per_token", 8, alias="num_experts_per_tok"
        ),
        "num_shared_experts": fields.map_size(
            "moe.shared_experts", 1, alias="n_shared_experts"
        ),
        "moe_renormalize": fields.map_flag("moe.renormalise", True),
        "routed_scaling_factor": fields.map_number("moe.scale", 2.446),
        "moe_router_activation_func": fields.require_value("sigmoid"),
        "moe_layer_freq": fields.require_value(1),
        "mla_use_nope": fields.require_value(True, always_write=True),
        "use_grouped_topk": fields.ignore_key(),
        "rope_scaling": fields.require_value(None),
    },
    _make_table,
    {
        "positions.kind": "none",
        f"kinds.{LINEAR}.mixer.kind": DELTA,
        # That of the published code's class, whatever the model's.
        "attention.latent.norm_eps": 1e-6,
        "moe.score": "sigmoid",
        "moe.selection_bias": True,
        "moe.balance_loss": 0.0,
    },
    read_extra=_read,
    write_extra=_write,
    # transformers writes a dense layer's maps under the name of experts'.
    suffix_aliases={
        f"mlp.{name}.weight": f"block_sparse_moe.{name}.weight"
        for name in llama.SWIGLU_NAMES
    },
    layers_for_more_tokens="model.layers.{layer}",
    # Sizes that follow from others, and what counts for positions alone.
    ignored_keys=["head_dim", "qk_head_dim", "rope_theta", "num_nextn_predict_layers"],
)
