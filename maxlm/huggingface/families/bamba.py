"""Bamba (IBM, Princeton, CMU, UIUC 2024): Llama's shape with a Mamba-2 state space in
place of attention in most layers; half of a head's dimensions are turned. What Jamba,
Granite 4 and Falcon-H1 have of it too is here."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama, mamba2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import copy, linear, map_linears
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config

L = "model.layers.{layer}"
SETTINGS: fields.ConfigFields = {
    "mamba_n_heads": fields.map_size("num_heads", 128),
    "mamba_d_state": fields.map_size("state_size", 256),
    "mamba_n_groups": fields.map_size("num_groups", 1),
    "mamba_d_conv": fields.map_size("conv_width", 4),
    "mamba_proj_bias": fields.map_flag("bias", False),
    "mamba_conv_bias": fields.map_flag("conv_bias", True),
}
INERT = ("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient")
OUTER = {
    "model.embed_tokens.weight": copy("embedding.table", "lm_head.weight"),
    "model.final_layernorm.weight": copy("final_norm.scale"),
    "lm_head.weight": linear("head.kernel"),
}
NORMS = {
    f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
    f"{L}.pre_ff_layernorm.weight": copy("mlp_norm.scale"),
}
MLP = map_linears(f"{L}.feed_forward", "mlp", **llama.SWIGLU_NAMES)
TABLE = {
    **OUTER,
    **NORMS,
    **llama.ATTENTION,
    **mamba2.map_mamba2(f"{L}.mamba"),
    **MLP,
}


def read_heads(reader: ConfigReader, mixer: dict[str, Any], inner: int) -> None:
    """Reads the size of a state space's heads, which make up ``inner`` channels, and
    its time steps' bounds."""
    num_heads = mixer["num_heads"]
    if reader.values.get("mamba_d_head") == "auto":
        reader.values["mamba_d_head"] = inner // num_heads
    mixer["head_dim"] = reader.size("mamba_d_head", inner // num_heads)
    if num_heads * mixer["head_dim"] != inner:
        message = f"mamba_n_heads={num_heads} heads do not make up {inner} channels"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    mixer |= mamba2.read_step_limit(reader, "time_step_limit")


def write_heads(config: TransformerConfig) -> dict[str, Any]:
    """Writes what :func:`read_heads` reads."""
    mixer = fields.find_mixer(config, Mamba2Config)
    return {
        "mamba_d_head": mixer.head_dim,
        "time_step_limit": mamba2.write_step_limit(mixer),
    }


def read_expand(reader: ConfigReader, settings: dict[str, Any]) -> int:
    """Reads the channels of a state space, a multiple of the model's width."""
    return reader.size("mamba_expand", 2) * settings["d_model"]


def write_expand(config: TransformerConfig) -> int:
    """Writes what :func:`read_expand` reads. Raises MaxlmError: channels that are no
    multiple of the width."""
    mixer = fields.find_mixer(config, Mamba2Config)
    return divide_by_width(config, mixer.num_heads * mixer.head_dim)


def divide_by_width(config: TransformerConfig, num_channels: int) -> int:
    """Returns the multiple of the model's width that channels are. Raises MaxlmError:
    they are none."""
    if num_channels % config.d_model:
        message = f"{num_channels} channels are no multiple of d_model={config.d_model}"
        fix = "make them one, or keep maxlm's own files"
        raise MaxlmError(message, where="mixer", fix=fix)
    return num_channels // config.d_model


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    mixer = settings["kinds"]["mamba"]["mixer"]
    read_heads(reader, mixer, read_expand(reader, settings))
    settings["kinds"]["attention"] = {}
    attention_layers = reader.indices("attn_layer_indices", settings["num_layers"])
    kinds = [
        "attention" if layer in attention_layers else "mamba"
        for layer in range(settings["num_layers"])
    ]
    fields.name_layers(settings, kinds)


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    return {
        **write_heads(config),
        "mamba_expand": write_expand(config),
        "attn_layer_indices": [
            layer for layer, kind in enumerate(kinds) if kind == "attention"
        ],
    }


BAMBA = ModelFamily(
    "bamba",
    "BambaForCausalLM",
    {
        **fields.SIZES,
        "vocab_size": fields.map_size("vocab_size", 128_000),
        "max_position_embeddings": fields.map_size("max_seq_len", 262_144),
        **llama.map_kv_heads(8),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
        **fields.map_in_mixer("kinds.mamba.mixer", Mamba2Config, SETTINGS),
    },
    TABLE,
    {"kinds.mamba.mixer.kind": "mamba2"},
    rope_kwargs={"partial": 0.5},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=[*INERT, "attn_rotary_emb"],
)
