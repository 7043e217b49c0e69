"""OLMo (Groeneveld et al. 2024, arXiv 2402.00838): Llama's shape with LayerNorms without
weights. OLMo 2 (OLMo Team 2025, arXiv 2501.00656) and OLMo 3 (OLMo Team 2025, arXiv
2512.13961): norms of what each branch adds, norms of queries and keys over all heads;
OLMo 3 has windows in three of four layers, and scales positions in the fourth alone.
FlexOlmo (Shi et al. 2025, arXiv 2507.07024): OLMo 2 with experts."""

from typing import Any

from maxlm.huggingface.families import fields, llama, qwen, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import copy, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
OUTPUT_NORMS = {
    f"{L}.post_attention_layernorm.weight": copy("attention_post_norm.scale"),
    f"{L}.post_feedforward_layernorm.weight": copy("mlp_post_norm.scale"),
}
TABLE = {
    **llama.OUTER,
    **llama.ATTENTION,
    **OUTPUT_NORMS,
    f"{L}.self_attn.q_norm.weight": linear("attention.query_norm.scale"),
    f"{L}.self_attn.k_norm.weight": linear("attention.key_norm.scale"),
    **llama.MLP,
}
_FIELDS = {
    **llama.COMMON,
    **llama.SWIGLU,
    "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
    "attention_bias": fields.map_flag("attention.bias", False),
}
FIXED = {
    "placement": "output",
    "attention.qk_norm": True,
    "attention.qk_norm_form": "all_heads",
}


def _read_olmo3(reader: ConfigReader, settings: dict[str, Any]) -> None:
    # A theta outside counts for layers without a window alone; all have this one.
    reader.read_implemented("rope_theta", 500_000.0, None)
    settings["positions"], local_positions = rope.read_positions_by_kind(
        reader,
        settings["attention"]["head_dim"],
        theta=500_000.0,
        local_theta=500_000.0,
    )
    local: dict[str, Any] = {"window": reader.size("sliding_window", 4096)}
    if local_positions != settings["positions"]:
        local["positions"] = local_positions
    layer_numbers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if number % 4 else GLOBAL for number in layer_numbers]
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: {}})


def _write_olmo3(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    values = {"layer_types": kinds, **rope.write_positions_by_kind(config)}
    if window is not None:
        values["sliding_window"] = window
    return values


OLMO2 = ModelFamily("olmo2", "Olmo2ForCausalLM", _FIELDS, TABLE, FIXED, rope_kwargs={})
OLMO3 = ModelFamily(
    "olmo3",
    "Olmo3ForCausalLM",
    _FIELDS,
    TABLE,
    FIXED,
    read_extra=_read_olmo3,
    write_extra=_write_olmo3,
)
FLEX_OLMO = ModelFamily(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    {
        **llama.COMMON,
        **llama.EXPERTS,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", False),
        "num_experts": fields.map_size("moe.num_experts", alias="num_local_experts"),
        "intermediate_size": fields.map_size("moe.d_ff"),
        "norm_topk_prob": fields.map_flag("moe.renormalise", False),
        "router_aux_loss_coef": fields.map_balance_loss(0.01),
    },
    {**TABLE, **qwen.EXPERTS},
    FIXED,
    rope_kwargs={},
)
OLMO = ModelFamily(
    "olmo",
    "OlmoForCausalLM",
    {
        **fields.SIZES,
        **llama.map_kv_heads(None),
        **llama.SWIGLU,
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "attention_bias": fields.map_flag("attention.bias", False),
        "clip_qkv": fields.map_number("attention.clip", None),
    },
    {**llama.OUTER, **llama.ATTENTION, **llama.MLP},
    {"norm.kind": "layernorm", "norm.weightless": True, "norm.eps": 1e-5},
    rope_kwargs={},
)
