"""MiMo-V2-Flash (Xiaomi 2026, arXiv 2601.02780): windows in most layers, with sinks and
twice the kv heads of the others; value heads narrower than keys; a third of a head's
dimensions turned; DeepSeek-V3's experts without shared ones."""

from dataclasses import replace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.modules import FINAL_NORM_MODULES, LAYER
from maxlm.huggingface.families.names import copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.positions import PositionsConfig

L = "model.layers.{layer}"
TABLE = {
    **llama.TABLE,
    **qwen.EXPERTS,
    **deepseek.SELECTION_BIAS,
    f"{L}.self_attn.attention_sink_bias": copy("attention.sinks"),
}
_SHARE = 0.334
"""Of a head's dimensions that turn, where the file does not say."""


def _read_positions(
    reader: ConfigReader, kind: str, head_dim: int, theta: float
) -> dict[str, Any]:
    section = reader.read_nested("rope_parameters").read_nested(kind)
    section.read_implemented("rope_type", "default")
    share = reader.number("partial_rotary_factor", _SHARE, most=1)
    share = section.number("partial_rotary_factor", share, most=1)
    return {
        "kind": "rope",
        "theta": section.number("rope_theta", theta),
        # Cut off, as in the published code.
        "rotary_dim": int(head_dim * share),
    }


def _read_window(reader: ConfigReader) -> int:
    """Reads the tokens that a token sees; the published file counts those before it."""
    window = reader.size("sliding_window", 129)
    if reader.has("sliding_window_size"):
        window = reader.size("sliding_window_size") + 1
    return window


def _read_kinds(reader: ConfigReader, num_layers: int) -> list[str]:
    """Reads each layer's kind, from the published file's list of ones and zeros or from
    that of names."""
    has_window = [layer > 0 and (layer + 1) % 6 != 0 for layer in range(num_layers)]
    has_window = reader.flags("hybrid_layer_pattern") or has_window
    if len(has_window) != num_layers:
        message = f"hybrid_layer_pattern does not name {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    kinds = [LOCAL if is_local else GLOBAL for is_local in has_window]
    return list(fields.read_layer_types(reader, kinds, (LOCAL, GLOBAL)))


def _read_global_kind(reader: ConfigReader) -> dict[str, Any]:
    """Reads the kind of layers that see all."""
    value_scale = reader.number("attention_value_scale", 0.707, nullable=True)
    if value_scale in (None, 1):
        return {}
    # A factor on values is one on attention's output, which has no offset.
    return {"mixer_scales": {"output": value_scale}}


def _read_local_kind(reader: ConfigReader, attention: dict[str, Any]) -> dict[str, Any]:
    """Reads the kind of layers with a window; ``attention``: that of the others."""
    theta = reader.number("swa_rope_theta", 10_000.0)
    num_kv_heads = 2 * attention["num_kv_heads"]
    return {
        **_read_global_kind(reader),
        "window": _read_window(reader),
        "positions": _read_positions(reader, LOCAL, attention["head_dim"], theta),
        "attention": attention | {"num_kv_heads": num_kv_heads, "sinks": True},
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    head_dim = attention["head_dim"]
    if attention["value_head_dim"] == head_dim:
        del attention["value_head_dim"]
    expected = {
        "swa_num_attention_heads": attention["num_heads"],
        "swa_num_key_value_heads": 2 * attention["num_kv_heads"],
        "swa_head_dim": head_dim,
        "swa_v_head_dim": attention.get("value_head_dim", head_dim),
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    for key, value in expected.items():
        reader.read_implemented(key, value)

    theta = reader.number("rope_theta", 5_000_000.0)
    settings["positions"] = _read_positions(reader, GLOBAL, head_dim, theta)
    settings["kinds"] = {
        LOCAL: _read_local_kind(reader, attention),
        GLOBAL: _read_global_kind(reader),
    }
    num_layers = settings["num_layers"]
    fields.name_layers(settings, _read_kinds(reader, num_layers))

    has_experts = reader.flags("moe_layer_freq")
    num_dense = has_experts.count(False) if has_experts else 1
    if has_experts and has_experts != [
        layer >= num_dense for layer in range(num_layers)
    ]:
        message = "moe_layer_freq has dense layers behind others"
        fix = "convert a model whose dense layers come first"
        raise MaxlmError(message, where=reader.where, fix=fix)
    deepseek.read_dense_list(reader, settings, num_dense)


def _write_positions(positions: PositionsConfig, head_dim: int) -> dict[str, Any]:
    if positions.scaling is not None:
        message = f"positions.scaling.kind={positions.scaling.kind}"
        raise MaxlmError(message, fix="write it under another family")
    # A little more than the ratio, whose product is cut off.
    share = ((positions.rotary_dim or head_dim) + 1e-6) / head_dim
    return {
        "rope_type": "default",
        "rope_theta": positions.theta,
        "partial_rotary_factor": min(share, 1.0),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    names = fields.list_kind_names(config)
    head_dim = config.attention.head_dim
    # As all kinds have it.
    value_scale = config.layer_kinds[0].mixer_scales.output
    positions = {GLOBAL: _write_positions(config.positions, head_dim)}
    positions[LOCAL] = positions[GLOBAL]
    values: dict[str, Any] = {
        **deepseek.write_dense_list(config),
        "layer_types": names,
        "attention_value_scale": value_scale,
        "v_head_dim": config.attention.value_dim,
    }
    # transformers has another key for it.
    del values["first_k_dense_replace"]
    local = config.kinds.get(LOCAL)
    if local is not None:
        values["sliding_window"] = local.window
        local_positions = config.get_positions(local)
        positions[LOCAL] = _write_positions(local_positions, head_dim)
    return {**values, "rope_parameters": positions}


def _read_module_layer(
    reader: ConfigReader, settings: dict[str, Any]
) -> dict[str, Any]:
    """Reads a module's layer: with a window, and dense."""
    local = _read_local_kind(reader, settings["attention"])
    return local | {"mlp": {"d_ff": reader.size("intermediate_size")}}


_MODULE = "model.mtp.layers.{module}"
_MODULES = replace(
    FINAL_NORM_MODULES,
    layer=_MODULE,
    table={
        name.replace(LAYER, _MODULE): rule
        for name, rule in FINAL_NORM_MODULES.table.items()
    },
    marks=tuple(mark.replace(LAYER, _MODULE) for mark in FINAL_NORM_MODULES.marks),
    suffixes={"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"},
    read_layer=_read_module_layer,
)

MIMO_V2_FLASH = ModelFamily(
    "mimo_v2_flash",
    "MiMoV2FlashForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(4),
        **deepseek.map_sigmoid_routing(groups=1, groups_per_token=1),
        "head_dim": fields.map_size("attention.head_dim", 192),
        "v_head_dim": fields.map_size("attention.value_head_dim", 128),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", False),
        "n_routed_experts": fields.map_size(
            "moe.num_experts", 256, alias="num_local_experts"
        ),
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "scoring_func": fields.require_value("sigmoid"),
        "topk_method": fields.require_value("noaux_tc"),
        "n_shared_experts": fields.require_value(None, 0),
        "layernorm_epsilon": fields.require_value(1e-5),
    },
    TABLE,
    {**deepseek.SIGMOID_ROUTING, "attention.out_bias": False},
    read_extra=_read,
    write_extra=_write,
    layers_for_more_tokens="model.mtp",
    modules=_MODULES,
    # Which the published code does not read.
    ignored_keys=["attention_chunk_size", "hybrid_block_size"],
)
