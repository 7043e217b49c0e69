"""Apertus (Swiss AI Initiative 2025, arXiv 2509.14233): Llama's shape with norms of
queries and keys, and an FFN without a gate whose activation has learnt slopes."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import write_scaling
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
_THETA = 12_000_000.0
_SCALING = {
    "kind": "llama3",
    "factor": 8.0,
    "original_length": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
"""The scaling of a file that says nothing of positions."""


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    if not (reader.has("rope_scaling") or reader.has("rope_parameters")):
        settings["positions"]["scaling"] = _SCALING


def _write(config: TransformerConfig) -> dict[str, Any]:
    if write_scaling(config.positions) is not None:
        return {}
    # Absent, it would mean the usual one.
    theta = config.positions.theta
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


APERTUS = ModelFamily(
    "apertus",
    "ApertusForCausalLM",
    {
        **llama.COMMON,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "intermediate_size": fields.map_size("mlp.d_ff", 14_336),
        "hidden_act": fields.require_value("xielu", always_write=True),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.require_value(False),
        "post_norm": fields.require_value(False),
        "qk_norm": fields.require_value(True),
    },
    {
        **llama.OUTER,
        **llama.ATTENTION,
        f"{L}.attention_layernorm.weight": copy("attention_norm.scale"),
        f"{L}.feedforward_layernorm.weight": copy("mlp_norm.scale"),
        **llama.MLP,
        f"{L}.mlp.act_fn.alpha_p": copy("mlp.positive_slope"),
        f"{L}.mlp.act_fn.alpha_n": copy("mlp.negative_slope"),
    },
    {
        "attention.qk_norm": True,
        "mlp.gated": False,
        "mlp.activation.kind": "xielu",
    },
    rope_kwargs={"theta": _THETA},
    read_extra=_read,
    write_extra=_write,
    # The activation's constants, whatever the model.
    ignored_tensors=[f"model.layers.*.mlp.act_fn.{name}" for name in ("beta", "eps")],
)
