"""Qwen1.5-MoE and Qwen2-57B-A14B (Qwen Team 2024; Yang et al. 2024, arXiv 2407.10671):
Qwen2's attention, small experts, and a shared layer with a width and a gate of its
own."""

from typing import Any

from maxlm.huggingface.families import fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
SHARED_EXPERT = {
    **map_linears(f"{L}.mlp.shared_expert", "moe.shared", **llama.SWIGLU_NAMES),
    f"{L}.mlp.shared_expert_gate.weight": linear("moe.shared_gate"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    reader.ignore("intermediate_size")  # of dense layers, which there are none of
    is_used = reader.flag("use_sliding_window", False)
    window = reader.size("sliding_window", 4096, least=0, nullable=True)
    first = reader.size("max_window_layers", 28, least=0)
    # Every other one of the first layers has the window, if there is one.
    kinds = [
        LOCAL if is_used and layer % 2 == 0 and layer < first else GLOBAL
        for layer in range(settings["num_layers"])
    ]
    local = {"window": (window or None) if is_used else None}
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: {}})


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    return {
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


QWEN2_MOE = ModelFamily(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(16),
        **llama.EXPERTS,
        "qkv_bias": fields.map_flag("attention.bias", True),
        "num_experts": fields.map_size("moe.num_experts", alias="num_local_experts"),
        "moe_intermediate_size": fields.map_size("moe.d_ff"),
        "shared_expert_intermediate_size": fields.map_size("moe.shared_d_ff"),
        "norm_topk_prob": fields.map_flag("moe.renormalise", False),
        "decoder_sparse_step": fields.require_value(1, always_write=True),
        "mlp_only_layers": fields.require_value([], None, always_write=True),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
    },
    {**llama.TABLE, **qwen.EXPERTS, **SHARED_EXPERT},
    {
        "attention.out_bias": False,
        "moe.shared_experts": 1,
        "moe.shared_gate": True,
    },
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
)
