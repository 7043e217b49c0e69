"""Zamba (Glorioso et al. 2024, arXiv 2405.16712): layers of two of Mamba's mixers side
by side; in some of them a block of attention and an MLP comes first, whose weights all
of these share."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import bamba, fields, llama, mamba, zamba2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    depthwise,
    interleave_rows,
    join_rules,
    linear,
    stack_rules,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba_heads import MambaHeadsConfig
from maxlm.models.shared_block import SharedBlockConfig

L = "model.layers.{layer}"
_SHARED = {
    **zamba2.SHARED_NORMS,
    **zamba2.SHARED_ATTENTION,
    **{
        f"feed_forward.{theirs}.weight": linear(f"mlp.{ours}.kernel")
        for theirs, ours in llama.SWIGLU_NAMES.items()
    },
}


def _map_heads(theirs: str, ours: str, mixer: MambaHeadsConfig) -> NameTable:
    """Returns the entries of the mixers of a layer, which files have together: rows of
    ``in_proj`` are a channel's input and gate by turns."""
    heads = [f"{ours}.head{number}" for number in range(mixer.num_heads)]
    channels = mixer.head.d_inner
    in_proj = [
        interleave_rows(channels, f"{head}.input.kernel", f"{head}.gate.kernel")
        for head in heads
    ]
    return {
        f"{theirs}.in_proj.weight": join_rules(*in_proj, axis=0),
        f"{theirs}.conv1d.weight": depthwise(
            *(f"{head}.conv_weight" for head in heads)
        ),
        f"{theirs}.conv1d.bias": linear(*(f"{head}.conv_bias" for head in heads)),
        f"{theirs}.x_proj_weight": stack_rules(
            *(linear(f"{head}.x_proj.kernel") for head in heads)
        ),
        f"{theirs}.dt_proj_weight": stack_rules(
            *(linear(f"{head}.dt_proj.kernel") for head in heads)
        ),
        f"{theirs}.dt_proj_bias": stack_rules(
            *(copy(f"{head}.dt_bias") for head in heads)
        ),
        f"{theirs}.A_log": stack_rules(*(copy(f"{head}.A_log") for head in heads)),
        f"{theirs}.D": stack_rules(*(copy(f"{head}.D") for head in heads)),
        f"{theirs}.out_proj.weight": join_rules(
            *(linear(f"{head}.out.kernel") for head in heads), axis=1
        ),
    }


def _find_heads(config: TransformerConfig) -> MambaHeadsConfig:
    """Returns the mixer that all layers have. Raises MaxlmError: it is another one."""
    mixer = fields.find_mixer(config, SharedBlockConfig).mixer
    if not isinstance(mixer, MambaHeadsConfig):
        message = "a shared_block before another mixer than mamba_heads"
        raise MaxlmError(message, fix="write it under another family")
    return mixer


def _make_table(config: TransformerConfig) -> NameTable:
    mixer = _find_heads(config)
    return {
        **bamba.OUTER,
        **zamba2.map_shared(config, "shared_transf", _SHARED),
        f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
        **_map_heads(f"{L}.mamba", "mamba_heads", mixer),
        f"{L}.linear.weight": linear("shared.linear.kernel"),
        f"{L}.mamba_decoder.input_layernorm.weight": copy("shared.norm.scale"),
        **_map_heads(f"{L}.mamba_decoder.mamba", "shared.mamba_heads", mixer),
    }


def _read_mixer(reader: ConfigReader, d_model: int) -> dict[str, Any]:
    num_heads = reader.size("n_mamba_heads", 2)
    inner = reader.size("mamba_expand", 2) * d_model
    if inner % num_heads:
        message = f"n_mamba_heads={num_heads} heads do not make up {inner} channels"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    reader.read_implemented("mamba_proj_bias", False)
    reader.read_implemented("hidden_mamba_act", "silu")
    head = {
        "d_inner": inner // num_heads,
        "d_state": reader.size("mamba_d_state", 16),
        "d_conv": reader.size("mamba_d_conv", 4, least=2),
        "dt_rank": mamba.read_rank(reader, "mamba_dt_rank", d_model),
        "conv_bias": reader.flag("mamba_conv_bias", True),
        "dt_min": reader.number("time_step_min", 0.001),
        "dt_max": reader.number("time_step_max", 0.1),
    }
    return {"kind": "mamba_heads", "num_heads": num_heads, "head": head}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    d_model = settings["d_model"]
    num_layers = settings["num_layers"]
    mixer = _read_mixer(reader, d_model)
    block = {
        "kind": "shared_block",
        "attention": zamba2.read_attention(reader, d_model, num_heads=16),
        "mlp": {
            "d_ff": reader.size("intermediate_size", 14_848),
            "activation": fields.read_activation(reader, "hidden_act", "gelu"),
        },
        "mixer": mixer,
    }
    settings["kinds"] = {
        "mamba": {"mixer": mixer, "ffn": "none"},
        "hybrid0": {"mixer": block, "ffn": "none"},
    }
    period = reader.size("attn_layer_period", 6)
    offset = reader.size("attn_layer_offset", 4, least=0)
    # The third layer, and behind it by a period.
    hybrid_layers = {2, *range(3 + offset, num_layers, period)}
    default = [
        "hybrid" if layer in hybrid_layers else "mamba" for layer in range(num_layers)
    ]
    names = zamba2.read_layer_names(reader, num_layers, default)
    fields.name_layers(settings, zamba2.name_hybrid_layers(names, 1))


def _write(config: TransformerConfig) -> dict[str, Any]:
    block = fields.find_mixer(config, SharedBlockConfig)
    mixer = _find_heads(config)
    zamba2.check_block(config, block)
    if len(config.shared_blocks) > 1 or block.mlp_rank or block.attention_rank:
        message = "several shared blocks, or low-rank maps beside one"
        raise MaxlmError(message, fix="write it under another family")
    attention = block.attention
    return {
        "layers_block_type": zamba2.write_layer_names(config, 1),
        "n_mamba_heads": mixer.num_heads,
        "mamba_expand": bamba.divide_by_width(
            config, mixer.num_heads * mixer.head.d_inner
        ),
        "mamba_d_state": mixer.head.d_state,
        "mamba_d_conv": mixer.head.d_conv,
        "mamba_dt_rank": mixer.head.dt_rank,
        "mamba_conv_bias": mixer.head.conv_bias,
        "time_step_min": mixer.head.dt_min,
        "time_step_max": mixer.head.dt_max,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "attention_head_dim": attention.head_dim,
        "intermediate_size": block.mlp.d_ff,
        "hidden_act": fields.to_hf_activation(block.mlp.activation),
    }


ZAMBA = ModelFamily(
    "zamba",
    "ZambaForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size", 32_000),
        "hidden_size": fields.map_size("d_model", 3712),
        "num_hidden_layers": fields.map_layer_count("num_layers", 76),
        "max_position_embeddings": fields.map_size("max_seq_len", 4096),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        # Without it transformers shares no block's weights either.
        "tie_word_embeddings": fields.require_value(True, always_write=True),
    },
    _make_table,
    {"tie_embeddings": True, "positions.kind": "none"},
    read_extra=_read,
    write_extra=_write,
    # Choices of programs and of initial weights, and what follows from other values.
    ignored_keys=[
        *("use_associative_scan", "use_mamba_kernels", "time_step_floor"),
        *("num_logits_to_keep", "layer_types", "head_dim"),
    ],
)
