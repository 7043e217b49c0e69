"""Cohere's Command R and Aya 23 (Aryabumi et al. 2024, arXiv 2405.15032), Command R7B
and A (Cohere 2025, arXiv 2504.00698): attention and FFN side by side with one norm, a
LayerNorm without offsets, neighbouring dimensions turned, scaled logits. Command R+ normalises
queries and keys with a scale for each head; the second architecture has windows, and
no positions where it has none."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import (
    NameTable,
    TensorRule,
    copy,
    linear,
    permute_rotary,
    split_heads,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"


def _table(config: TransformerConfig) -> NameTable:
    head_dim = config.attention.head_dim

    def map_head_norm(ours: str) -> TensorRule:
        rows = permute_rotary(linear(ours), head_dim, each_head=True)
        return split_heads(rows)

    return {
        **llama.OUTER,
        f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
        **llama.map_paired_attention(config),
        f"{L}.self_attn.q_norm.weight": map_head_norm("attention.query_norm.scale"),
        f"{L}.self_attn.k_norm.weight": map_head_norm("attention.key_norm.scale"),
        **llama.MLP,
    }


_FIELDS = {
    **fields.SIZES,
    **llama.map_kv_heads(None),
    **llama.SWIGLU,
    "layer_norm_eps": fields.map_number("norm.eps", 1e-5),
    "logit_scale": fields.map_number("logit_scale", 0.0625),
    "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
    "attention_bias": fields.map_flag("attention.bias", False),
}
_FIXED = {"norm.kind": "layernorm", "placement": "parallel_shared"}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    reader.read_implemented("head_dim", None, attention["head_dim"])
    if attention.get("qk_norm"):
        attention["qk_norm_form"] = "per_head"


def _read_windows(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read(reader, settings)
    window = reader.size("sliding_window", 4096)
    period = reader.size("sliding_window_pattern", 4)
    layer_numbers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if number % period else GLOBAL for number in layer_numbers]
    settings |= fields.read_layer_pattern(
        reader,
        kinds,
        {LOCAL: {"window": window}, GLOBAL: {"positions": {"kind": "none"}}},
    )


def _write_windows(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    values: dict[str, Any] = {"layer_types": kinds}
    if window is not None:
        values["sliding_window"] = window
    return values


COHERE = ModelFamily(
    "cohere",
    "CohereForCausalLM",
    {
        **_FIELDS,
        "use_qk_norm": fields.map_flag("attention.qk_norm", False),
    },
    _table,
    _FIXED,
    rope_kwargs={"theta": 500_000.0},
    read_extra=_read,
    ignored_keys=["model_max_length"],
)
COHERE2 = ModelFamily(
    "cohere2",
    "Cohere2ForCausalLM",
    {
        **_FIELDS,
        # What the first files say of what the published code always does.
        "order_of_interleaved_layers": fields.require_value("local_attn_first"),
        "position_embedding_type": fields.require_value("rope_gptj"),
        "rotary_pct": fields.require_value(1.0),
        "use_embedding_sharing": fields.require_value(True),
        "use_gated_activation": fields.require_value(True),
        "use_parallel_block": fields.require_value(True),
        "use_qk_norm": fields.require_value(False),
    },
    _table,
    _FIXED,
    rope_kwargs={},
    read_extra=_read_windows,
    write_extra=_write_windows,
    ignored_keys=["cache_implementation", "layer_switch", "use_parallel_embedding"],
)
