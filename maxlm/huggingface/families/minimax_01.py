"""MiniMax-01 (MiniMax 2025, arXiv 2501.08313): lightning attention with softmax
attention in one layer of eight, experts, and branches that are added to their normed
input with weights. Slopes are read from the file; tables that follow from them are
left out, as transformers makes them anew."""

from typing import Any

from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    copy_with_ones,
    interleave_by_kv_head,
    linear,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
_NORM_EPS = 1e-6
"""Of lightning attention's norm, which no key of the file says."""
_KIND_OF_NAME = {"linear_attention": "lightning", "full_attention": "attention"}
_NAME_OF_KIND = {kind: name for name, kind in _KIND_OF_NAME.items()}
_PREFIX_OF_KIND = {"lightning": "linear_attn", "attention": "full_attn"}
_QKV = ("lightning.query.kernel", "lightning.key.kernel", "lightning.value.kernel")
TABLE = {
    **llama.MIXTRAL_TABLE,
    f"{L}.self_attn.qkv_proj.weight": interleave_by_kv_head(*_QKV),
    f"{L}.self_attn.output_gate.weight": linear("lightning.gate.kernel"),
    f"{L}.self_attn.out_proj.weight": linear("lightning.out.kernel"),
    f"{L}.self_attn.norm.weight": linear("lightning.norm_scale"),
    f"{L}.self_attn.slope_rate": copy_with_ones("lightning.slopes", before=0, behind=2),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    attention = settings["attention"]
    usual = [
        "linear_attention" if layer % 2 else "full_attention"
        for layer in range(num_layers)
    ]
    names = fields.read_layer_types(reader, usual, _KIND_OF_NAME)
    # The published code turns so many dimensions; transformers does not read it.
    rotary_dim = reader.size("rotary_dim", attention["head_dim"])
    if rotary_dim != attention["head_dim"]:
        settings["positions"]["rotary_dim"] = rotary_dim
    lightning = {
        "kind": "lightning",
        "num_heads": attention["num_heads"],
        "head_dim": attention["head_dim"],
        "norm_eps": _NORM_EPS,
    }
    settings["kinds"] = {"lightning": {"mixer": lightning}, "attention": {}}
    ffn_scales = _read_scales(reader, "mlp")
    for kind, prefix in _PREFIX_OF_KIND.items():
        settings["kinds"][kind] |= {
            "mixer_scales": _read_scales(reader, prefix),
            "ffn_scales": ffn_scales,
        }
    fields.name_layers(settings, [_KIND_OF_NAME[name] for name in names])


def _read_scales(reader: ConfigReader, prefix: str) -> dict[str, float]:
    return {
        "stream": reader.number(f"{prefix}_alpha_factor", 1.0),
        "output": reader.number(f"{prefix}_beta_factor", 1.0),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    values: dict[str, Any] = {"layer_types": [_NAME_OF_KIND[kind] for kind in kinds]}
    if config.positions.rotary_dim is not None:
        values["rotary_dim"] = config.positions.rotary_dim
    for kind, prefix in _PREFIX_OF_KIND.items():
        if kind not in config.kinds:
            continue
        settings = config.kinds[kind]
        values |= {
            f"{prefix}_alpha_factor": settings.mixer_scales.stream,
            f"{prefix}_beta_factor": settings.mixer_scales.output,
            "mlp_alpha_factor": settings.ffn_scales.stream,
            "mlp_beta_factor": settings.ffn_scales.output,
        }
    return values


MINIMAX = ModelFamily(
    "minimax",
    "MiniMaxForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(8),
        **llama.EXPERTS,
        "max_position_embeddings": fields.map_size("max_seq_len", 131_072),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "num_local_experts": fields.map_size("moe.num_experts", 8, alias="num_experts"),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token", 2),
        "intermediate_size": fields.map_size("moe.d_ff", 14_336),
        "sliding_window": fields.require_value(None),
        "router_jitter_noise": fields.require_value(0.0),
    },
    TABLE,
    {"placement": "normed"},
    rope_kwargs={"theta": 1_000_000.0, "partial": 1.0},
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=(
        "model.layers.*.self_attn.query_decay",
        "model.layers.*.self_attn.key_decay",
        "model.layers.*.self_attn.diagonal_decay",
    ),
    ignored_keys=["block_size"],
)
