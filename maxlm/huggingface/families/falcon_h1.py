"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): attention and a Mamba-2 state space
side by side in each layer, factors (µP) on what most maps read and give."""

from operator import attrgetter
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import bamba, fields, llama, mamba2, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config
from maxlm.models.parallel_heads import ParallelHeadsConfig

L = "model.layers.{layer}"
TABLE = {
    **bamba.OUTER,
    **bamba.NORMS,
    **map_linears(
        f"{L}.self_attn", "parallel.attention", **llama.PROJECTIONS, o_proj="out"
    ),
    **mamba2.map_mamba2(f"{L}.mamba", "parallel.mamba2"),
    **bamba.MLP,
}
_SCALES = ("gate", "value", "key", "query", "step")


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    mixer = settings["mixer"]
    _read_attention(reader, mixer["attention"], settings["d_model"])
    state_space = mixer["mixer"]
    inner = reader.size("mamba_d_ssm", 1024, nullable=True)
    if inner is None:
        inner = bamba.read_expand(reader, settings)
    reader.ignore("mamba_expand")
    bamba.read_heads(reader, state_space, inner)
    norm = "norm_first" if reader.flag("mamba_norm_before_gate", True) else "gate_first"
    has_norm = reader.flag("mamba_rms_norm", False)
    state_space["gated_norm"] = norm if has_norm else "none"
    scales = _read_scales(reader, "ssm_multipliers", len(_SCALES))
    if scales != [1.0] * len(_SCALES):
        names = zip(_SCALES, scales, strict=True)
        state_space["projection_scales"] = dict(names)
    gate_scale, output_scale = _read_scales(reader, "mlp_multipliers", 2)
    settings["mlp"] |= {"gate_scale": gate_scale, "output_scale": output_scale}
    settings["positions"] = rope.read_position_settings(
        reader, mixer["attention"]["head_dim"]
    )


def _read_scales(reader: ConfigReader, key: str, count: int) -> list[float]:
    """Reads so many factors, ones where the file has none."""
    scales = reader.numbers(key) if reader.has(key) else [1.0] * count
    if len(scales) != count:
        message = f"{key} has {len(scales)} numbers, not {count}"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return scales


def _read_attention(
    reader: ConfigReader, attention: dict[str, Any], d_model: int
) -> None:
    head_dim = reader.size("head_dim", d_model // attention["num_heads"])
    attention["head_dim"] = head_dim
    # Keys that are multiplied give scores that are.
    factor = reader.number("key_multiplier", 1.0)
    if factor != 1:
        attention["scale"] = factor * head_dim**-0.5


def _write(config: TransformerConfig) -> dict[str, Any]:
    mixer = config.mixer
    assert isinstance(mixer, ParallelHeadsConfig)
    assert config.mlp is not None
    state_space = mixer.mixer
    assert isinstance(state_space, Mamba2Config)
    attention = mixer.attention
    scales = state_space.projection_scales
    factor = 1.0
    if attention.scale is not None:
        factor = attention.scale / attention.head_dim**-0.5
    return {
        "head_dim": attention.head_dim,
        "key_multiplier": factor,
        "mamba_d_ssm": state_space.num_heads * state_space.head_dim,
        "mamba_d_head": state_space.head_dim,
        "time_step_limit": mamba2.write_step_limit(state_space),
        "mamba_rms_norm": state_space.gated_norm != "none",
        "mamba_norm_before_gate": state_space.gated_norm != "gate_first",
        "projectors_bias": state_space.has_out_bias,
        "ssm_multipliers": [
            1.0 if scales is None else getattr(scales, name) for name in _SCALES
        ],
        "mlp_multipliers": [config.mlp.gate_scale, config.mlp.output_scale],
        **rope.write_position_settings(config.positions, attention.head_dim),
    }


def _map_state_space(key: str, field: fields.ConfigField) -> fields.ConfigFields:
    """Declares a key that holds a setting of the state space."""
    ours = f"mixer.mixer.{field.ours}"
    return {key: fields.ConfigField(field.read, ours, attrgetter(ours))}


_STATE_SPACE: dict[str, fields.ConfigField] = {}
for _key, _field in {
    **bamba.SETTINGS,
    "ssm_in_multiplier": fields.map_number("input_scale", 1.0),
}.items():
    _STATE_SPACE |= _map_state_space(_key, _field)

FALCON_H1 = ModelFamily(
    "falcon_h1",
    "FalconH1ForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size", 128_000),
        "num_hidden_layers": fields.map_layer_count("num_layers"),
        "hidden_size": fields.map_size("d_model"),
        "max_position_embeddings": fields.map_size("max_seq_len", 8192),
        "num_attention_heads": fields.map_size("mixer.attention.num_heads"),
        "num_key_value_heads": fields.map_size("mixer.attention.num_kv_heads", 8),
        "attention_bias": fields.map_flag("mixer.attention.bias", False),
        "attention_in_multiplier": fields.map_number(
            "mixer.attention_input_scale", 1.0
        ),
        "attention_out_multiplier": fields.map_number(
            "mixer.attention_output_scale", 1.0
        ),
        "ssm_out_multiplier": fields.map_number("mixer.mixer_output_scale", 1.0),
        "projectors_bias": fields.ConfigField(
            lambda reader, key: reader.flag(key, False), "mixer.mixer.out_bias"
        ),
        "embedding_multiplier": fields.map_number("embedding_scale", 1.0),
        "lm_head_multiplier": fields.map_number("logit_scale", 1.0),
        **llama.SWIGLU,
        "mlp_bias": fields.map_flag("mlp.bias", False),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        **_STATE_SPACE,
    },
    TABLE,
    {"mixer.kind": "parallel_heads", "mixer.mixer.kind": "mamba2"},
    read_extra=_read,
    write_extra=_write,
    # What the published code does not read.
    ignored_keys=[*bamba.INERT, "attn_layer_indices", "mamba_use_mlp"],
)
