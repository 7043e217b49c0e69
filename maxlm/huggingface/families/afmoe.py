"""AFMoE, of the Trinity models (Arcee AI 2025, their published code and weights):
DeepSeek-V3's experts behind attention with norms of queries and keys and a gate; norms
before and behind each branch; windows in most layers, no positions in the others."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import copy, linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
_EXPERT = f"{L}.mlp.experts.{{expert}}"
TABLE = {
    **llama.TABLE,
    f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
    f"{L}.post_attention_layernorm.weight": copy("attention_post_norm.scale"),
    f"{L}.pre_mlp_layernorm.weight": copy("mlp_norm.scale"),
    f"{L}.post_mlp_layernorm.weight": copy("mlp_post_norm.scale"),
    f"{L}.self_attn.gate_proj.weight": linear("attention.gate.kernel"),
    f"{L}.mlp.router.gate.weight": linear("moe.router"),
    f"{L}.mlp.expert_bias": copy("moe.selection_bias"),
    f"{_EXPERT}.gate_proj.weight": linear("moe.gate"),
    f"{_EXPERT}.up_proj.weight": linear("moe.up"),
    f"{_EXPERT}.down_proj.weight": linear("moe.down"),
    **map_linears(f"{L}.mlp.shared_experts", "moe.shared", **llama.SWIGLU_NAMES),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    if reader.flag("mup_enabled", False):
        settings["embedding_scale"] = settings["d_model"] ** 0.5
    num_dense = reader.size("num_dense_layers", 1, least=0)
    settings["dense_layers"] = num_dense
    width = reader.size("intermediate_size", 6144)
    if num_dense:
        settings["mlp"] = {"d_ff": width}

    period = reader.size("global_attn_every_n_layers", 4)
    layer_numbers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if number % period else GLOBAL for number in layer_numbers]
    window = reader.size("sliding_window", 1024)
    kind_settings = {
        LOCAL: {"window": window},
        GLOBAL: {"positions": {"kind": "none"}},
    }
    settings |= fields.read_layer_pattern(reader, kinds, kind_settings)


def _write(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    kinds, window = fields.write_layer_types(config)
    values: dict[str, Any] = {
        "layer_types": kinds,
        "mup_enabled": config.embedding_scale != 1,
        "num_dense_layers": config.dense_layers,
        # Without dense layers nothing reads the width.
        "intermediate_size": moe.d_ff if config.mlp is None else config.mlp.d_ff,
    }
    if window is not None:
        values["sliding_window"] = window
    return values


AFMOE = ModelFamily(
    "afmoe",
    "AfmoeForCausalLM",
    {
        **llama.COMMON,
        "head_dim": fields.map_size("attention.head_dim", 128),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.require_value(False),
        "num_experts": fields.map_size(
            "moe.num_experts", 64, alias="num_local_experts"
        ),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token", 6),
        "moe_intermediate_size": fields.map_size("moe.d_ff", 1408),
        "num_shared_experts": fields.map_size("moe.shared_experts", 2),
        "route_scale": fields.map_number("moe.scale", 1.0),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "score_func": fields.require_value("sigmoid"),
        "route_norm": fields.require_value(True),
        **{
            key: fields.require_value(1)
            for key in ("n_group", "topk_group", "num_expert_groups")
        },
        "num_limited_groups": fields.require_value(1),
    },
    TABLE,
    {
        "placement": "sandwich",
        "attention.qk_norm": True,
        "attention.output_gate": "element",
        "moe.score": "sigmoid",
        "moe.selection_bias": True,
        "moe.balance_loss": 0.0,
    },
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
    # Of how products are computed, and of training.
    ignored_keys=["use_grouped_mm", "load_balance_coeff"],
)
