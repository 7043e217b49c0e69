"""Hunyuan's dense models (Tencent Hunyuan Team 2025): Llama's shape with norms of each
query and key head behind RoPE, whose base is stretched by a constant."""

from typing import Any

from maxlm.huggingface.families import fields, llama, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.rope import NtkScaling

L = "model.layers.{layer}"


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    usual = "rope_parameters" if reader.has("rope_parameters") else "rope_scaling"
    rope_reader = reader.read_nested(usual)
    alpha = rope_reader.number("alpha", None, least=1)
    settings["positions"] = rope.read_position_settings(
        reader, settings["attention"]["head_dim"]
    )
    scaling = settings["positions"]["scaling"]
    if alpha is not None and scaling is not None and scaling["kind"] == "dynamic_ntk":
        # A constant factor, and not one that follows the length: what else is named
        # there is not read.
        settings["positions"]["scaling"] = {"kind": "ntk", "factor": alpha}
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            rope_reader.ignore(key)


def _write(config: TransformerConfig) -> dict[str, Any]:
    head_dim = config.attention.head_dim
    positions = config.positions
    scaling = positions.scaling
    if isinstance(scaling, NtkScaling):
        plain = positions.model_copy(update={"scaling": None})
        values = rope.write_position_settings(plain, head_dim)
        stretched = {"rope_type": "dynamic", "alpha": scaling.factor, "factor": 1.0}
        values["rope_scaling"] = stretched
    else:
        values = rope.write_position_settings(positions, head_dim)
    # The published code wants it.
    return {**values, "head_dim": head_dim}


HUNYUAN_V1_DENSE = ModelFamily(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    {
        **llama.COMMON,
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", False),
        # What files say of what the published code always does.
        "use_qk_norm": fields.require_value(True),
        "use_cla": fields.require_value(False),
        "mlp_bias": fields.require_value(False),
        "use_rotary_pos_emb": fields.require_value(True),
        "norm_type": fields.require_value("rms"),
    },
    {
        **llama.OUTER,
        **llama.NORMS,
        **map_linears(f"{L}.self_attn", "attention", **llama.PROJECTIONS, o_proj="out"),
        f"{L}.self_attn.query_layernorm.weight": copy("attention.query_norm.scale"),
        f"{L}.self_attn.key_layernorm.weight": copy("attention.key_norm.scale"),
        **llama.MLP,
    },
    {"attention.qk_norm": True, "attention.qk_norm_after_rope": True},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=["attention_head_dim", "cla_share_factor", "eod_token_id"],
)
