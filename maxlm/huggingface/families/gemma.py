"""Gemma 1 (Gemma Team 2024, arXiv 2403.08295), 2 (arXiv 2408.00118) and 3 (2025, arXiv
2503.19786): norms that multiply by 1 + scale, gated GELU, embeddings times the root of
the width. VaultGemma (Sinha et al. 2025, arXiv 2510.15001): Gemma 2 with norms before
branches alone."""

from dataclasses import replace
from typing import Any

from maxlm.huggingface.families import fields, llama, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
SANDWICH = {
    **llama.TABLE,
    f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
    f"{L}.post_attention_layernorm.weight": copy("attention_post_norm.scale"),
    f"{L}.pre_feedforward_layernorm.weight": copy("mlp_norm.scale"),
    f"{L}.post_feedforward_layernorm.weight": copy("mlp_post_norm.scale"),
}
TANH = "gelu_pytorch_tanh"
INERT = ("cache_implementation", "_sliding_window_pattern")
FIXED = {"norm.zero_centred": True}


def _declare_fields(kv_heads: int) -> fields.ConfigFields:
    return {
        **llama.COMMON,
        **llama.map_kv_heads(kv_heads),
        "head_dim": fields.map_size("attention.head_dim", 256, nullable=True),
        "attention_bias": fields.map_flag("attention.bias", False),
        "intermediate_size": fields.map_size("mlp.d_ff"),
        "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
        "use_bidirectional_attention": fields.require_value(None, False),
    }


def _read(
    reader: ConfigReader, settings: dict[str, Any], *, local: bool = False
) -> None:
    settings["embedding_scale"] = settings["d_model"] ** 0.5
    # Gemma 1 was published with "gelu" and meant its approximation; hidden_activation
    # came later, and stands beside hidden_act in many files of Gemma 2 and 3.
    key, other = "hidden_act", "hidden_activation"
    if local:
        key, other = other, key
    if not local and reader.values.get(key) == "gelu":
        reader.values[key] = TANH
    settings["mlp"]["activation"] = fields.read_activation(reader, key, TANH)
    reader.read_implemented(other, None, reader.text(key, TANH))


def _write(config: TransformerConfig) -> dict[str, Any]:
    assert config.mlp is not None
    activation = config.mlp.activation
    if activation == "gelu_tanh":
        name = TANH
    else:
        name = fields.to_hf_activation(activation)
    return {"hidden_activation": name, "hidden_act": name}


def _declare_local_fields(
    soft_cap: float | None, logit_cap: float | None
) -> fields.ConfigFields:
    """Declares what Gemma 2 and 3 add; caps are null where the file says so."""
    return {
        **_declare_fields(4),
        "attn_logit_softcapping": fields.map_number(
            "attention.soft_cap", soft_cap, nullable=True
        ),
        "final_logit_softcapping": fields.map_number(
            "logit_cap", logit_cap, nullable=True
        ),
    }


def _read_local(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read(reader, settings, local=True)
    settings["attention"]["scale"] = reader.number("query_pre_attn_scalar") ** -0.5


def _write_local(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    attention = config.attention
    scale = attention.scale or attention.head_dim**-0.5
    # scale = divisor^(−1/2); published divisors are whole, which the root has rounded.
    divisor = round(scale**-2, 6)
    values = {
        **_write(config),
        "query_pre_attn_scalar": int(divisor) if divisor.is_integer() else divisor,
        "layer_types": kinds,
    }
    if window is not None:
        values["sliding_window"] = window
    return values


def _read_gemma2(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read_local(reader, settings)
    num_layers = settings["num_layers"]
    kinds = [GLOBAL if layer % 2 else LOCAL for layer in range(num_layers)]
    window = reader.size("sliding_window", 4096, nullable=True)
    reader.read_implemented("sliding_window_size", window)  # once more
    settings |= fields.read_layer_pattern(
        reader, kinds, {LOCAL: {"window": window}, GLOBAL: {}}
    )


def _read_gemma3(reader: ConfigReader, settings: dict[str, Any]) -> None:
    """Local layers have a theta of their own, and no scaling."""
    _read_local(reader, settings)
    settings["positions"], local_positions = rope.read_positions_by_kind(
        reader,
        settings["attention"]["head_dim"],
        theta=1_000_000.0,
        local_theta=reader.number("rope_local_base_freq", 10_000.0),
    )
    period = reader.size("sliding_window_pattern", 6)
    if not reader.has("layer_types"):  # else the published code does not read it
        reader.read_implemented("_sliding_window_pattern", None, period)
    layer_numbers = range(1, settings["num_layers"] + 1)
    kinds = [LOCAL if number % period else GLOBAL for number in layer_numbers]
    local_settings = {
        "window": reader.size("sliding_window", 4096, nullable=True),
        "positions": local_positions,
    }
    settings |= fields.read_layer_pattern(
        reader, kinds, {LOCAL: local_settings, GLOBAL: {}}
    )


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    return {**_write_local(config), **rope.write_positions_by_kind(config)}


GEMMA = ModelFamily(
    "gemma",
    "GemmaForCausalLM",
    _declare_fields(16),
    llama.TABLE,
    FIXED,
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
)
GEMMA2 = ModelFamily(
    "gemma2",
    "Gemma2ForCausalLM",
    _declare_local_fields(50.0, 30.0),
    SANDWICH,
    {**FIXED, "placement": "sandwich"},
    rope_kwargs={},
    read_extra=_read_gemma2,
    write_extra=_write_local,
    ignored_keys=INERT,
)
GEMMA3 = ModelFamily(
    "gemma3",
    "Gemma3ForCausalLM",
    {
        **_declare_local_fields(None, None),
        # The published code does not apply it.
        "attn_logit_softcapping": fields.require_value(None, ours="attention.soft_cap"),
    },
    SANDWICH,
    {**FIXED, "placement": "sandwich", "attention.qk_norm": True},
    read_extra=_read_gemma3,
    write_extra=_write_gemma3,
    ignored_keys=INERT,
    hf_model_type="gemma3_text",
)
VAULTGEMMA = replace(
    GEMMA2,
    name="vaultgemma",
    hf_architecture="VaultGemmaForCausalLM",
    name_table={
        **llama.OUTER,
        **llama.ATTENTION,
        **llama.MLP,
        f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
        f"{L}.pre_feedforward_layernorm.weight": copy("mlp_norm.scale"),
    },
    fixed_settings=FIXED,
)
