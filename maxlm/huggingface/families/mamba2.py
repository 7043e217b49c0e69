"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060) and Codestral Mamba (Mistral AI 2024):
layers of a state space alone. What hybrids have of it too is here."""

import math
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy, depthwise, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config

L = "backbone.layers.{layer}"
_MAPS = ("gate", "value", "key", "query", "step")
_CONVS = ("value_conv", "key_conv", "query_conv")
TRAINED_LENGTH = 2048
"""Tokens of a row that published models without attention were trained on; nothing in
their files says it."""

# What chooses initial weights, how sums are rounded or cut into chunks.
INERT = (
    *("chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_rank"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_scale"),
    *("time_step_init_scheme", "rms_norm", "norm_before_gate"),
)


def map_mamba2(theirs: str, ours: str = "mamba2") -> NameTable:
    """Returns the entries of a Mamba-2 mixer."""
    return {
        f"{theirs}.in_proj.weight": linear(*(f"{ours}.{m}.kernel" for m in _MAPS)),
        f"{theirs}.in_proj.bias": linear(*(f"{ours}.{m}.bias" for m in _MAPS)),
        f"{theirs}.conv1d.weight": depthwise(*(f"{ours}.{conv}" for conv in _CONVS)),
        f"{theirs}.conv1d.bias": linear(*(f"{ours}.{conv}_bias" for conv in _CONVS)),
        f"{theirs}.dt_bias": copy(f"{ours}.dt_bias"),
        f"{theirs}.A_log": copy(f"{ours}.A_log"),
        f"{theirs}.D": copy(f"{ours}.D"),
        f"{theirs}.norm.weight": linear(f"{ours}.norm_scale"),
        f"{theirs}.out_proj.weight": linear(f"{ours}.out.kernel"),
        f"{theirs}.out_proj.bias": linear(f"{ours}.out.bias"),
    }


def read_step_limit(
    reader: ConfigReader, key: str, least: float = 0.0
) -> dict[str, float | None]:
    """Reads the bounds of time steps."""
    smallest, largest = reader.bounds(key, (least, math.inf))
    return {
        "min_step": smallest,
        "max_step": largest if math.isfinite(largest) else None,
    }


def write_step_limit(mixer: Mamba2Config) -> list[object]:
    """Writes what :func:`read_step_limit` reads."""
    largest = mixer.max_step
    return [mixer.min_step, {"__float__": "Infinity"} if largest is None else largest]


_SETTINGS: fields.ConfigFields = {
    "num_heads": fields.map_size("num_heads", 128),
    "head_dim": fields.map_size("head_dim", 64),
    "state_size": fields.map_size("state_size", 128),
    "n_groups": fields.map_size("num_groups", 8),
    "conv_kernel": fields.map_size("conv_width", 4),
    "use_bias": fields.map_flag("bias", False),
    "use_conv_bias": fields.map_flag("conv_bias", True),
    "hidden_act": fields.require_value("silu", always_write=True),
}
OUTER = {
    "backbone.embeddings.weight": copy("embedding.table", "lm_head.weight"),
    "backbone.norm_f.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    mixer = settings["mixer"]
    inner = mixer["num_heads"] * mixer["head_dim"]
    if reader.number("expand", 2) * settings["d_model"] != inner:
        message = f"heads and their size make {inner}, not expand times the width"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    mixer |= read_step_limit(reader, "time_step_limit")


def _write(config: TransformerConfig) -> dict[str, Any]:
    mixer = fields.find_mixer(config, Mamba2Config)
    expand = mixer.num_heads * mixer.head_dim / config.d_model
    return {
        "expand": int(expand) if expand.is_integer() else expand,
        "time_step_limit": write_step_limit(mixer),
    }


MAMBA2 = ModelFamily(
    "mamba2",
    "Mamba2ForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size"),
        "num_hidden_layers": fields.map_layer_count("num_layers"),
        "hidden_size": fields.map_size("d_model"),
        "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        **fields.map_in_mixer("mixer", Mamba2Config, _SETTINGS),
    },
    {
        **OUTER,
        f"{L}.norm.weight": copy("attention_norm.scale"),
        **map_mamba2(f"{L}.mixer"),
    },
    {
        "mixer.kind": "mamba2",
        "ffn": "none",
        "positions.kind": "none",
        "max_seq_len": TRAINED_LENGTH,
    },
    read_extra=_read,
    write_extra=_write,
    prefix="backbone.",
    ignored_keys=INERT,
)
