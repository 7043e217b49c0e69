"""Hunyuan-A13B (Tencent Hunyuan Team 2025, technical report of Hunyuan-A13B): the dense
models' attention, and beside each token's experts one that serves all."""

from operator import attrgetter
from typing import Any

from maxlm.huggingface.families import fields, hunyuan, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, linear, map_linears
from maxlm.huggingface.families.reader import REQUIRED, ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
_DENSE = hunyuan.HUNYUAN_V1_DENSE


def _table(config: TransformerConfig) -> NameTable:
    assert not callable(_DENSE.name_table)
    experts = {name: rule for name, rule in qwen.EXPERTS.items() if "{expert}" in name}
    return {
        **_DENSE.name_table,
        **experts,
        f"{L}.mlp.gate.wg.weight": linear("moe.router"),
        **map_linears(f"{L}.mlp.shared_mlp", "moe.shared", **llama.SWIGLU_NAMES),
    }


def _read_alike(reader: ConfigReader, key: str, default: object) -> int:
    """Reads a number that may be written once for each layer, if all are the same."""
    value = reader.values.get(key)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        reader.ignore(key)
        reader = ConfigReader({key: value[0]}, reader.where)
    return reader.size(key, default)


def _map_alike(ours: str) -> fields.ConfigField:
    """Declares such a number; it is written once."""
    return fields.ConfigField(
        lambda reader, key: _read_alike(reader, key, REQUIRED), ours, attrgetter(ours)
    )


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _DENSE.read_extra(reader, settings)
    d_ff = settings["moe"]["d_ff"]
    # The published code has these, whatever the file says.
    for key, value in (("moe_intermediate_size", d_ff), ("num_shared_expert", 1)):
        if _read_alike(reader, key, value) != value:
            reader.read_implemented(key, value)


HUNYUAN_V1_MOE = ModelFamily(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    {
        **_DENSE.fields,
        "intermediate_size": fields.map_size("moe.d_ff"),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "num_experts": _map_alike("moe.num_experts"),
        "moe_topk": _map_alike("moe.experts_per_token"),
        "norm_topk_prob": fields.require_value(True),
        "routed_scaling_factor": fields.require_value(1.0),
        "use_mixed_mlp_moe": fields.require_value(True),
        "group_limited_greedy": fields.require_value(False),
        "moe_layer_num_skipped": fields.require_value(0),
    },
    _table,
    {**_DENSE.fixed_settings, "moe.shared_experts": 1},
    read_extra=_read,
    write_extra=_DENSE.write_extra,
    ignored_keys=[
        *_DENSE.ignored_keys,
        # Of training.
        *("moe_drop_tokens", "moe_random_routing_dropped_token", "capacity_factor"),
    ],
)
