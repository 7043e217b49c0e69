"""gpt-oss (OpenAI 2025, arXiv 2508.10925): windows by turns, sinks, biases throughout,
experts with a clamped unit, YaRN. Published weights of experts are in MXFP4; they are
read as bf16, and written so, as transformers does."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import (
    copy,
    linear,
    map_linears,
    take_turns,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
E = f"{L}.mlp.experts"
TABLE = {
    **llama.OUTER,
    **llama.NORMS,
    **map_linears(f"{L}.self_attn", "attention", **llama.PROJECTIONS, o_proj="out"),
    f"{L}.self_attn.sinks": copy("attention.sinks"),
    f"{L}.mlp.router.weight": linear("moe.router"),
    f"{L}.mlp.router.bias": copy("moe.router_bias"),
    # Inputs come first, as in ours.
    f"{E}.gate_up_proj": take_turns("moe.gate", "moe.up"),
    f"{E}.gate_up_proj_bias": take_turns("moe.gate_bias", "moe.up_bias"),
    f"{E}.down_proj": copy("moe.down"),
    f"{E}.down_proj_bias": copy("moe.down_bias"),
}
_YARN = {
    "kind": "yarn",
    "factor": 32.0,
    "original_length": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
"""The scaling of a file that names none."""


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    if not (reader.has("rope_scaling") or reader.has("rope_parameters")):
        settings["positions"]["scaling"] = _YARN
    window = reader.size("sliding_window", 128)
    kinds = [GLOBAL if layer % 2 else LOCAL for layer in range(settings["num_layers"])]
    local = {"window": window}
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: {}})


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    values: dict[str, Any] = {"layer_types": kinds}
    if window is not None:
        values["sliding_window"] = window
    if config.positions.scaling is None:
        # Absent, it would mean the usual one.
        values["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": config.positions.theta,
        }
    return values


GPT_OSS = ModelFamily(
    "gpt_oss",
    "GptOssForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        "head_dim": fields.map_size("attention.head_dim", 64, nullable=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "attention_bias": fields.map_flag("attention.bias", True),
        "num_local_experts": fields.map_size("moe.num_experts", alias="num_experts"),
        "num_experts_per_tok": fields.map_size(
            "moe.experts_per_token", alias="experts_per_token"
        ),
        "intermediate_size": fields.map_size("moe.d_ff"),
        # Its unit is none of those that this key names.
        "hidden_act": fields.require_value("silu"),
        "swiglu_alpha": fields.map_number("moe.activation.alpha", 1.702),
        "swiglu_limit": fields.map_number("moe.activation.limit", 7.0),
        "router_aux_loss_coef": fields.map_balance_loss(0.001),
    },
    TABLE,
    {
        "attention.sinks": True,
        "moe.activation.kind": "clamped_swiglu",
        "moe.bias": True,
        "moe.router_bias": True,
    },
    rope_kwargs={"theta": 150_000.0},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=["initial_context_length"],  # which the scaling says too
)
