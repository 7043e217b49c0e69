"""Mamba (Gu & Dao 2023, arXiv 2312.00752) and Falcon-Mamba (Zuo et al. 2024, arXiv
2410.05355): layers of a selective scan alone; the latter normalises what each token
chooses, without weights. What Jamba has of it too is here."""

from typing import Any

from maxlm.huggingface.families import fields, mamba2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy, depthwise, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba import MambaConfig

L = "backbone.layers.{layer}"


def map_mamba(theirs: str, ours: str = "mamba") -> NameTable:
    """Returns the entries of a Mamba mixer."""
    return {
        f"{theirs}.in_proj.weight": linear(
            f"{ours}.input.kernel", f"{ours}.gate.kernel"
        ),
        f"{theirs}.in_proj.bias": linear(f"{ours}.input.bias", f"{ours}.gate.bias"),
        f"{theirs}.conv1d.weight": depthwise(f"{ours}.conv_weight"),
        f"{theirs}.conv1d.bias": copy(f"{ours}.conv_bias"),
        f"{theirs}.x_proj.weight": linear(f"{ours}.x_proj.kernel"),
        f"{theirs}.dt_proj.weight": linear(f"{ours}.dt_proj.kernel"),
        f"{theirs}.dt_proj.bias": copy(f"{ours}.dt_bias"),
        f"{theirs}.dt_layernorm.weight": copy(f"{ours}.dt_norm.scale"),
        f"{theirs}.b_layernorm.weight": copy(f"{ours}.B_norm.scale"),
        f"{theirs}.c_layernorm.weight": copy(f"{ours}.C_norm.scale"),
        f"{theirs}.A_log": copy(f"{ours}.A_log"),
        f"{theirs}.D": copy(f"{ours}.D"),
        f"{theirs}.out_proj.weight": linear(f"{ours}.out.kernel"),
        f"{theirs}.out_proj.bias": linear(f"{ours}.out.bias"),
    }


def read_rank(reader: ConfigReader, key: str, d_model: int) -> int:
    """Reads the rank of step sizes, a sixteenth of the width where it is "auto"."""
    usual = -(-d_model // 16)
    if reader.values.get(key) == "auto":
        reader.values[key] = usual
    return reader.size(key, usual)


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    mixer = settings["mixer"]
    d_model = settings["d_model"]
    # The latter wins, in files that have both (Falcon-Mamba).
    expand = reader.size("expand", 2)
    inner = reader.size("intermediate_size", expand * d_model)
    mixer["d_inner"] = inner
    mixer["dt_rank"] = read_rank(reader, "time_step_rank", d_model)
    # Once more, in some files.
    same = {
        "d_inner": inner,
        "d_model": d_model,
        "n_layer": settings["num_layers"],
    }
    for key, value in same.items():
        reader.read_implemented(key, None, value)


def _write(config: TransformerConfig) -> dict[str, Any]:
    mixer = fields.find_mixer(config, MambaConfig)
    return {
        "expand": max(1, mixer.d_inner // config.d_model),
        "intermediate_size": mixer.d_inner,
        "time_step_rank": mixer.dt_rank,
    }


_SETTINGS: fields.ConfigFields = {
    "state_size": fields.map_size("d_state", 16),
    "conv_kernel": fields.map_size("d_conv", 4, least=2),
    "use_bias": fields.map_flag("bias", False),
    "use_conv_bias": fields.map_flag("conv_bias", True),
    "time_step_min": fields.map_number("dt_min", 0.001),
    "time_step_max": fields.map_number("dt_max", 0.1),
    "hidden_act": fields.require_value("silu", always_write=True),
}
_FIELDS = {
    "vocab_size": fields.map_size("vocab_size", 50_280),
    "num_hidden_layers": fields.map_layer_count("num_layers", 32),
    "hidden_size": fields.map_size("d_model", 768),
    "layer_norm_epsilon": fields.map_number("norm.eps", 1e-5),
    "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
    **fields.map_in_mixer("mixer", MambaConfig, _SETTINGS),
}
_TABLE = {
    **mamba2.OUTER,
    f"{L}.norm.weight": copy("attention_norm.scale"),
    **map_mamba(f"{L}.mixer"),
}
_FIXED = {"mixer.kind": "mamba", "ffn": "none", "positions.kind": "none"}
# Choices of initial weights and of programs.
_INERT = (
    *("residual_in_fp32", "rescale_prenorm_residual", "time_step_floor"),
    *("time_step_init_scheme", "time_step_scale", "use_mambapy", "use_falcon_mambapy"),
    *("use_associative_scan", "fused_add_norm", "pad_vocab_size_multiple", "rms_norm"),
    "ssm_cfg",
)
MAMBA = ModelFamily(
    "mamba",
    "MambaForCausalLM",
    _FIELDS,
    _TABLE,
    {**_FIXED, "max_seq_len": mamba2.TRAINED_LENGTH},
    read_extra=_read,
    write_extra=_write,
    prefix="backbone.",
    suffix_aliases={"backbone.embeddings.weight": "backbone.embedding.weight"},
    ignored_keys=_INERT,
)
FALCON_MAMBA = ModelFamily(
    "falcon_mamba",
    "FalconMambaForCausalLM",
    {
        **_FIELDS,
        **fields.map_in_mixer(
            "mixer",
            MambaConfig,
            {"mixer_rms_eps": fields.map_number("inner_norm_eps", 1e-6)},
        ),
    },
    _TABLE,
    {**_FIXED, "max_seq_len": 8192, "mixer.inner_norms": "weightless"},
    read_extra=_read,
    write_extra=_write,
    prefix="backbone.",
    ignored_keys=_INERT,
)
