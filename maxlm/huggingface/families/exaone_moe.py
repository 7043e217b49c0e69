"""K-EXAONE (LG AI Research 2026, its published code and weights): DeepSeek-V3's experts
behind attention with norms of queries and keys; three layers of four have a window, the
fourth no positions."""

from typing import Any

from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.names import copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    deepseek.read_dense_list(reader, settings, 1)
    window = reader.size("sliding_window", 4096, nullable=True)
    period = 0
    if window is None or reader.has("layer_types"):
        reader.ignore("sliding_window_pattern")
    else:
        period = reader.size("sliding_window_pattern", 4, least=1)
    kinds = [
        LOCAL if period and (layer + 1) % period else GLOBAL
        for layer in range(num_layers)
    ]
    local = {"window": window}
    # Layers that see all have no positions, where others have a window.
    whole = {} if window is None else {"positions": {"kind": "none"}}
    settings |= fields.read_layer_pattern(reader, kinds, {LOCAL: local, GLOBAL: whole})


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    return {
        **deepseek.write_dense_list(config),
        "layer_types": kinds,
        "sliding_window": window,
    }


EXAONE_MOE = ModelFamily(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    {
        **llama.COMMON,
        **deepseek.map_sigmoid_routing(groups=1, groups_per_token=1),
        **llama.map_kv_heads(32),
        "num_experts": fields.map_size("moe.num_experts"),
        "num_shared_experts": fields.map_size("moe.shared_experts", 1),
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "routed_scaling_factor": fields.map_number("moe.scale", 2.5),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "scoring_func": fields.require_value("sigmoid"),
        "topk_method": fields.require_value("noaux_tc"),
    },
    {
        **llama.TABLE,
        **qwen.EXPERTS,
        **deepseek.SHARED_EXPERTS,
        f"{L}.mlp.e_score_correction_bias": copy("moe.selection_bias"),
    },
    {**deepseek.SIGMOID_ROUTING, "attention.qk_norm": True},
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=["mtp*"],
    ignored_keys=["num_nextn_predict_layers", "num_mtp_layers"],
)
