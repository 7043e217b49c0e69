"""OLMo-Hybrid (OLMo Team 2026): three layers with a gated delta rule, with norms before
their branches, and one like OLMo 3's, with norms behind them, by turns."""

from typing import Any

from maxlm.huggingface.families import fields, llama, olmo
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, depthwise, linear
from maxlm.huggingface.families.qwen_hybrid import (
    DELTA,
    FULL,
    LINEAR,
    map_delta_net,
    read_kinds,
    write_kinds,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import (
    read_position_settings,
    write_position_settings,
)
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.gated_delta_net import GatedDeltaNetConfig

L = "model.layers.{layer}"
M = f"{L}.linear_attn"
_MAPS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "g_proj": "gate",
    "b_proj": "beta",
    "a_proj": "decay",
    "o_proj": "out",
}
_CONVS = {"q_conv1d": "query_conv", "k_conv1d": "key_conv", "v_conv1d": "value_conv"}
TABLE = {
    **olmo.TABLE,
    f"{L}.attention_layer_norm.weight": copy("attention_norm.scale"),
    f"{L}.feedforward_layer_norm.weight": copy("mlp_norm.scale"),
    **{
        f"{M}.{theirs}.weight": linear(f"{DELTA}.{ours}.kernel")
        for theirs, ours in _MAPS.items()
    },
    **{
        f"{M}.{theirs}.weight": depthwise(f"{DELTA}.{ours}")
        for theirs, ours in _CONVS.items()
    },
    f"{M}.A_log": copy(f"{DELTA}.A_log"),
    f"{M}.dt_bias": copy(f"{DELTA}.dt_bias"),
    f"{M}.o_norm.weight": copy(f"{DELTA}.norm.scale"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    num_heads = attention["num_heads"]
    mixer = settings["kinds"][LINEAR]["mixer"]
    mixer.setdefault("num_heads", num_heads)
    mixer.setdefault("num_key_heads", num_heads)
    width = settings["d_model"]
    mixer.setdefault("key_dim", int(0.75 * width / mixer["num_key_heads"]))
    mixer.setdefault("value_dim", 2 * mixer["key_dim"])
    rope = reader.read_nested("rope_parameters")
    thetas = [source.values.get("rope_theta", 1) for source in (reader, rope)]
    # Published models have a null there; a file without the key has the usual base.
    if None in thetas:
        settings["positions"] = {"kind": "none"}
        rope.ignore("rope_type")
    else:
        settings["positions"] = read_position_settings(reader, attention["head_dim"])
    settings["kinds"][LINEAR]["placement"] = "pre"
    num_layers = settings["num_layers"]
    kinds = [FULL if layer % 4 == 3 else LINEAR for layer in range(num_layers)]
    if FULL not in kinds:
        kinds[-1] = FULL
    read_kinds(reader, settings, kinds)


def _write(config: TransformerConfig) -> dict[str, Any]:
    values = write_kinds(config)
    if config.positions.kind == "none":
        # Absent, it would mean the usual one.
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    else:
        head_dim = config.attention.head_dim
        values |= write_position_settings(config.positions, head_dim)
    return values


OLMO_HYBRID = ModelFamily(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    {
        **llama.COMMON,
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "attention_bias": fields.map_flag("attention.bias", False),
        **map_delta_net(None, None, None, None),
        **fields.map_in_mixer(
            f"kinds.{LINEAR}.mixer",
            GatedDeltaNetConfig,
            {"linear_allow_neg_eigval": fields.map_flag("negative_eigenvalues", True)},
        ),
    },
    TABLE,
    {
        **olmo.FIXED,
        f"kinds.{LINEAR}.mixer.kind": DELTA,
        f"kinds.{LINEAR}.mixer.norm_eps": 1e-5,
    },
    read_extra=_read,
    write_extra=_write,
    layers_for_more_tokens="mtp",
    # transformers writes one of its names for two norms.
    suffix_aliases={"post_attention_layernorm.weight": "feedforward_layer_norm.weight"},
    # How weights begin.
    ignored_keys=(
        *("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max"),
        "linear_dt_init_floor",
    ),
)
